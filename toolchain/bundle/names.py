"""File names inside a bundle: POSIX paths that stay inside the folder they are written to."""

from __future__ import annotations

from collections.abc import Iterable


def unsafe_name(name: str) -> str:
    """Why ``name`` may not be a file of a bundle, or an empty string."""
    if not name:
        return "is empty"
    if len(name.encode(errors="surrogatepass")) > 1024:
        return "is longer than 1024 bytes"
    if not name.isprintable() or "\\" in name or ":" in name:
        return "holds a control character, a backslash or a colon"
    if name.startswith("/"):
        return "is an absolute path"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"has the path component {part!r}"
        if len(part.encode(errors="surrogatepass")) > 255:
            return "has a path component of more than 255 bytes"
    return ""


def name_conflicts(names: Iterable[str]) -> list[str]:
    """One line for each name that is unsafe, given twice, or both a file and a folder of another file."""
    seen: set[str] = set()
    problems = []
    for name in names:
        reason = unsafe_name(name)
        if reason:
            problems.append(f"{name!r} {reason}")
        elif name in seen:
            problems.append(f"{name!r} is given twice")
        seen.add(name)
    for name in sorted(seen):
        parents = name.split("/")[:-1]
        prefixes = {"/".join(parents[: i + 1]) for i in range(len(parents))}
        problems += [f"{prefix!r} is both a file and the folder of {name!r}" for prefix in sorted(prefixes & seen)]
    return problems
