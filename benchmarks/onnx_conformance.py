"""Prints how many of the official ONNX backend tests pass through TVM, are refused, wrong, or crash the process.

Each case runs in a child forked from one process that has everything loaded, so a crash or a hang costs that case
alone.  Refused means that the ONNX Runtime engine serves such a model, and that the build says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from onnx_cases import Case, Outcome, host_machine, is_core, load_cases, run_case  # noqa: E402

STATUSES = ("passed", "constant", "refused", "wrong", "crashed")


@dataclass(slots=True)
class _Child:
    """A running case."""

    case: Case
    pid: int
    deadline: float
    data: bytes = b""


def run_all(
    cases: Sequence[Case], run: Callable[[Case], Outcome], workers: int = 2, timeout_s: float = 60
) -> dict[str, Outcome]:
    """Outcomes by name, each case run in a forked child; ``crashed`` for one that dies, raises or takes too long."""
    waiting, running, outcomes = list(reversed(cases)), {}, {}
    while waiting or running:
        while waiting and len(running) < workers:
            fd, child = _start(waiting.pop(), run, timeout_s)
            running[fd] = child
        now = time.monotonic()
        ready, _, _ = select.select(list(running), [], [], max(0.0, min(c.deadline for c in running.values()) - now))
        for fd in list(running):
            child = running[fd]
            late = time.monotonic() > child.deadline
            chunk = os.read(fd, 1 << 16) if fd in ready else b""
            child.data += chunk
            if (fd in ready and not chunk) or late:
                outcomes[child.case.name] = _end(fd, running.pop(fd), f"no end within {timeout_s:g} s" if late else "")
    return {case.name: outcomes[case.name] for case in cases}


def _start(case: Case, run: Callable[[Case], Outcome], timeout_s: float) -> tuple[int, _Child]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return reader, _Child(case, pid, time.monotonic() + timeout_s)
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    try:
        outcome = run(case)
    except BaseException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        outcome = Outcome("crashed", f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200])
    with contextlib.suppress(OSError), os.fdopen(writer, "wb") as stream:
        pickle.dump(outcome, stream)
    os._exit(0)


def _end(fd: int, child: _Child, problem: str) -> Outcome:
    """The outcome of a child that closed its pipe, or that is ended because of ``problem``."""
    os.close(fd)
    if problem:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    if problem:
        return Outcome("crashed", problem)
    if os.WIFSIGNALED(status):
        return Outcome("crashed", f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
    if not child.data:
        return Outcome("crashed", f"ended with status {os.waitstatus_to_exitcode(status)} and no answer")
    outcome: Outcome = pickle.loads(child.data)
    return outcome


def rates(title: str, outcomes: Iterable[Outcome]) -> str:
    """One line of the printed table."""
    counts = Counter(outcome.status for outcome in outcomes)
    total = sum(counts.values())
    share = f"{100 * (counts['passed'] + counts['constant']) / total:5.1f} %" if total else "    -  "
    return f"{title:16}" + "".join(f"{counts[s]:>9}" for s in STATUSES) + f"{total:>8}   {share} pass"


def print_rates(cases: Sequence[Case], outcomes: dict[str, Outcome]) -> None:
    """The table of both sets; ``constant``: passed with the operands that decide shapes and axes as constants."""
    print(" " * 16 + "".join(f"{s:>9}" for s in STATUSES) + f"{'of':>8}")
    print(rates("all", outcomes.values()))
    print(rates("inference core", (outcomes[c.name] for c in cases if is_core(c))))


def print_reasons(cases: Sequence[Case], outcomes: dict[str, Outcome]) -> None:
    """What did not pass: the number of cases by status, operator and reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for case in cases:
        outcome = outcomes[case.name]
        if outcome.status not in ("passed", "constant"):
            reason = re.sub(r" ?\(node '[^']*'\)|node '?[\w.:/]+'?", "", outcome.reason, flags=re.IGNORECASE)
            groups.setdefault((outcome.status, case.operator + (" *" if is_core(case) else ""), reason), []).append(
                case.name
            )
    print("\nNot passed (*: in the inference core):")
    order = {s: i for i, s in enumerate(("crashed", "wrong", "refused"))}
    for (status, operator, reason), names in sorted(groups.items(), key=lambda g: (order[g[0][0]], g[0][1])):
        print(f"{len(names):4} {status:8} {operator}: {reason}  [{names[0]}{', ...' if len(names) > 1 else ''}]")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", action="append", help="only cases that test this operator (repeatable)")
    parser.add_argument("--match", help="only cases whose name matches this regular expression")
    parser.add_argument("--core", action="store_true", help="only the inference core")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60, help="seconds allowed for a case")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--verbose", action="store_true", help="print why cases did not pass")
    return parser.parse_args()


def main() -> None:
    """Load, run, print."""
    arguments = _arguments()
    from toolchain.tvm.importer import known_operators

    # Loads TVM and the converters once, for all children.
    known_operators()
    machine = host_machine()
    cases = [
        case
        for case in load_cases()
        if (not arguments.operator or case.operator in arguments.operator)
        and (not arguments.match or re.search(arguments.match, case.name))
        and (not arguments.core or is_core(case))
    ]
    outcomes = run_all(cases, lambda case: run_case(case, machine), arguments.workers, arguments.timeout)
    print_rates(cases, outcomes)
    if arguments.verbose:
        print_reasons(cases, outcomes)
    if arguments.json:
        rows = [
            {"name": c.name, "operator": c.operator, "core": is_core(c), "status": o.status, "reason": o.reason}
            for c in cases
            for o in (outcomes[c.name],)
        ]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = sum(outcome.status in ("wrong", "crashed") for outcome in outcomes.values())
    if bad:
        sys.exit(f"{bad} cases are wrong or crashed")


if __name__ == "__main__":
    main()
