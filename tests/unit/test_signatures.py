"""Signatures of releases: what they cover, what is refused, and that OpenSSL agrees with them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundle_samples import bundle_spec, matrix_engine, requirements, sample_release
from helpers.keys import make_key, openssl

from toolchain.artifact import canonical_json, digest_bytes
from toolchain.bundle.check import read_index
from toolchain.bundle.layout import blob_path
from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.bundle.read import copy_bundle, open_release
from toolchain.bundle.resolve import resolve
from toolchain.bundle.sign import PASSWORD, check_signed, payload_of, read_trust, sign_release
from toolchain.cli.main import cli
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime import load

TARGETS = {"one": requirements(), "two": requirements()}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {
        "own": make_key(folder / "own.pem"),
        "other": make_key(folder / "other.pem"),
        "ed25519": make_key(folder / "ed.pem", "-algorithm", "ED25519"),
    }


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    return sample_release(folder / "r", matrix_engine(folder / "e"), TARGETS)


@pytest.fixture
def release(unsigned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unsigned, tmp_path / "r"))


def refusal(reference: str | Path, key: Path) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught, load(reference, "one", trust_key=key):
        pass
    return caught.value


@pytest.mark.parametrize("kind", ["own", "ed25519"])
def test_a_signed_release_is_the_same_release_and_loads_with_its_key(
    release: Path, keys: dict[str, tuple[Path, Path]], kind: str
) -> None:
    before = open_release(release)
    private, public = keys[kind]
    assert refusal(release, public).code is ExitCode.UNTRUSTED
    signed = sign_release(release, private)
    assert signed.digests == 3
    after = open_release(release)
    assert (after.digest, [b.digest for b in after.bundles]) == (before.digest, [b.digest for b in before.bundles])
    after.verify()
    with load(release, "one", trust_key=public) as model:
        assert model.run({"image": np.ones((1, 4), np.float32)})["scores"].shape == (1, 3)
    error = refusal(release, keys["other"][1])
    assert (error.code, error.where) == (ExitCode.UNTRUSTED, f"{release}@one")
    assert "none of its 2 signatures" in error.what


def test_signing_twice_changes_no_byte_and_a_second_key_is_added(
    release: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    def content() -> dict[str, bytes]:
        return {p.relative_to(release).as_posix(): p.read_bytes() for p in release.rglob("*") if p.is_file()}

    sign_release(release, keys["own"][0])
    once = content()
    sign_release(release, keys["own"][0])
    assert content() == once
    sign_release(release, keys["ed25519"][0])
    for name in ("own", "ed25519"):
        assert check_signed(resolve(f"{release}@two"), read_trust(keys[name][1]))


def test_a_file_of_several_keys_trusts_each(release: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    sign_release(release, keys["own"][0])
    both = tmp_path / "both.pub"
    both.write_bytes(keys["other"][1].read_bytes() + keys["own"][1].read_bytes())
    [_, own] = read_trust(both)
    assert check_signed(resolve(f"{release}@one"), read_trust(both)) == own


def test_openssl_verifies_the_signature_in_cosigns_form(
    release: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    sign_release(release, keys["own"][0], "registry.example/models/sample")
    index = json.loads((release / "index.json").read_text())
    root, signatures, *others = index["manifests"]
    assert len(others) == 2
    assert root["annotations"]["kind"] == "dev.cosignproject.cosign/imageIndex"
    assert signatures["annotations"] == {
        "kind": "dev.cosignproject.cosign/sigs",
        "org.opencontainers.image.ref.name": root["digest"].replace(":", "-") + ".sig",
    }
    manifest = json.loads((release / blob_path(signatures["digest"])).read_text())
    [layer] = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.dev.cosign.simplesigning.v1+json"
    payload = release / blob_path(layer["digest"])
    critical = json.loads(payload.read_text())["critical"]
    assert critical["image"] == {"docker-manifest-digest": root["digest"]}
    assert critical["identity"] == {"docker-reference": "registry.example/models/sample"}
    config = json.loads((release / blob_path(manifest["config"]["digest"])).read_text())
    assert config["rootfs"] == {"type": "layers", "diff_ids": [layer["digest"]]}
    value = tmp_path / "signature"
    value.write_bytes(base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"]))
    openssl("dgst", "-sha256", "-verify", keys["own"][1], "-signature", value, payload)


def flips(data: bytes, count: int) -> Iterator[bytes]:
    for place in range(0, len(data), max(1, len(data) // count)):
        bad = bytearray(data)
        bad[place] ^= 1 << (place % 8)
        yield bytes(bad)


def use_all(release: Path, key: Path) -> None:
    load(release, "one", trust_key=key).close()
    # What this bundle does not use is noticed when all is verified.
    open_release(release).verify()


def test_a_flipped_bit_in_any_file_of_a_signed_release_is_refused(
    release: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    sign_release(release, keys["own"][0])
    [one, _] = open_release(release).bundles
    other = {blob_path(b.digest) for b in open_release(release).bundles if b is not one}
    used = [p for p in release.rglob("*") if p.is_file() and p.relative_to(release).as_posix() not in other]
    assert len(used) > 12
    for path in used:
        good = path.read_bytes()
        for bad in flips(good, 12):
            path.write_bytes(bad)
            try:
                with pytest.raises(ToolchainError) as caught:
                    use_all(release, keys["own"][1])
                assert caught.value.code in (ExitCode.DAMAGED_BUNDLE, ExitCode.UNTRUSTED), path
            finally:
                path.write_bytes(good)
    load(release, "one", trust_key=keys["own"][1]).close()


def test_a_forged_signature_with_right_digests_is_untrusted(release: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    """The attacker can write every file, but has not the key."""
    sign_release(release, keys["own"][0])
    for bad in ("AAAA", "not base64!", ""):
        forge(release, lambda text, bad=bad: bad)
        assert refusal(release, keys["own"][1]).code is ExitCode.UNTRUSTED


def forge(release: Path, change: object) -> None:
    """Put other signatures into a release, with all digests as they should be."""
    path = release / "index.json"
    index = json.loads(path.read_text())
    for entry in index["manifests"][1:]:
        manifest = json.loads((release / blob_path(entry["digest"])).read_text())
        annotations = manifest["layers"][0]["annotations"]
        for name, text in annotations.items():
            annotations[name] = change(text)  # type: ignore[operator]
        data = canonical_json(manifest)
        entry["digest"], entry["size"] = digest_bytes(data), len(data)
        (release / blob_path(entry["digest"])).write_bytes(data)
    path.write_bytes(canonical_json(index))


def test_signatures_of_another_release_do_not_count(
    release: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    """The right key, the right form, but it signed something else."""
    other = tmp_path / "other"
    specs = [bundle_spec(matrix_engine(tmp_path / "e", [1]), name, needs) for name, needs in TARGETS.items()]
    pack_release("sample", "1.0.0", [pack_bundle(spec) for spec in specs], other)
    sign_release(other, keys["own"][0])
    sign_release(release, keys["other"][0])
    # Its signatures are moved over, under the tags of what stands here.
    index, foreign = (json.loads((f / "index.json").read_text()) for f in (release, other))
    for mine, its in zip(index["manifests"][1:], foreign["manifests"][1:], strict=True):
        mine["digest"], mine["size"] = its["digest"], its["size"]
    (release / "index.json").write_bytes(canonical_json(index))
    for blob in (other / "blobs" / "sha256").iterdir():
        shutil.copy(blob, release / "blobs" / "sha256" / blob.name)
    open_release(release).verify()
    assert refusal(release, keys["own"][1]).code is ExitCode.UNTRUSTED


def test_a_signature_of_the_release_alone_covers_its_bundles(release: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    """As `cosign sign` makes it without --recursive."""
    sign_release(release, keys["own"][0])
    index = json.loads((release / "index.json").read_text())
    del index["manifests"][2:]
    (release / "index.json").write_bytes(canonical_json(index))
    load(release, "one", trust_key=keys["own"][1]).close()


def test_copies_and_rebuilds_keep_signatures(
    release: Path, unsigned: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    sign_release(release, keys["own"][0])
    copy_bundle(resolve(f"{release}@two"), tmp_path / "copy")
    load(tmp_path / "copy", trust_key=keys["own"][1]).close()
    engine = matrix_engine(tmp_path / "e")
    packed = [pack_bundle(bundle_spec(engine, name, needs)) for name, needs in TARGETS.items()]
    assert pack_release("sample", "1.0.0", packed, release).unchanged
    assert len(read_index(release)[1]) == 3
    # What is built otherwise is not what was signed.
    assert not pack_release("sample", "1.0.0", packed[:1], release).unchanged
    assert read_index(release)[1] == ()


def test_keys_that_do_not_do_are_told_apart(
    release: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(key: Path) -> str:
        with pytest.raises(ToolchainError) as caught:
            sign_release(release, key)
        assert caught.value.code is ExitCode.USAGE
        return caught.value.what

    assert "private key" in told(keys["own"][1])
    assert "cannot be read" in told(tmp_path / "none.pem")
    (tmp_path / "text").write_text("nothing")
    assert "not a key in PEM" in told(tmp_path / "text")
    rsa, _ = make_key(tmp_path / "rsa.pem", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
    assert "allowed: ECDSA on P-256, or Ed25519" in told(rsa)
    with pytest.raises(ToolchainError, match="public keys"):
        read_trust(keys["own"][0])
    locked = tmp_path / "locked.pem"
    openssl("pkcs8", "-topk8", "-in", keys["own"][0], "-out", locked, "-passout", "pass:secret")
    assert f"{PASSWORD} is not set" in told(locked)
    monkeypatch.setenv(PASSWORD, "wrong")
    assert f"{PASSWORD} is wrong" in told(locked)
    monkeypatch.setenv(PASSWORD, "secret")
    sign_release(release, locked)
    load(release, "one", trust_key=keys["own"][1]).close()


def test_the_commands_sign_verify_and_refuse_with_code_34(release: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    runner = CliRunner()
    private, public = map(str, keys["own"])
    image = release.parent / "image.npy"
    np.save(image, np.ones((1, 4), np.float32))
    for words in (["verify", str(release), "--key", public], ["run", str(release), str(image), "--trust-key", public]):
        refused = runner.invoke(cli, words)
        assert isinstance(refused.exception, ToolchainError)
        assert refused.exception.code == 34
        assert "is not signed" in refused.exception.what
    done = runner.invoke(cli, ["sign", str(release), "--key", private])
    assert done.exit_code == 0, done.output
    assert open_release(release).digest in done.output
    assert "3 signatures; whose they are: toolchain verify" in runner.invoke(cli, ["inspect", str(release)]).output
    verified = runner.invoke(cli, ["verify", str(release), "--key", public])
    assert verified.exit_code == 0, verified.output
    assert verified.output.startswith("one: signed with key ")
    assert runner.invoke(cli, ["run", str(release), str(image), "--trust-key", public]).exit_code == 0
    _, _, last = read_index(release)[1]
    blob = release / blob_path(last.digest)
    blob.write_bytes(blob.read_bytes()[:-1] + b"]")
    damaged = runner.invoke(cli, ["verify", str(release)])
    assert isinstance(damaged.exception, ToolchainError)
    assert damaged.exception.code is ExitCode.DAMAGED_BUNDLE


def test_the_payload_is_what_cosign_writes() -> None:
    digest = "sha256:" + "0" * 64
    assert payload_of(digest, "a/b") == (
        b'{"critical":{"identity":{"docker-reference":"a/b"},"image":{"docker-manifest-digest":"'
        + digest.encode()
        + b'"},"type":"cosign container image signature"},"optional":null}'
    )
