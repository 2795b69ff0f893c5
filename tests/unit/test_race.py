"""How engines take turns."""

from __future__ import annotations

from toolchain.race import Racer, quantile, race


class Steady(Racer):
    """Takes the same time at each run, and notes in a common list when it was asked."""

    def __init__(self, ms: float, name: str, asked: list[tuple[str, int]]) -> None:
        super().__init__()
        self.ms, self.name, self.asked = ms, name, asked

    def ask(self, count: int) -> list[float]:
        assert count > 0
        self.asked.append((self.name, count))
        return [self.ms] * count


def test_engines_alternate_in_rounds_after_their_warm_up() -> None:
    asked: list[tuple[str, int]] = []
    racers = {name: Steady(ms, name, asked) for name, ms in {"a": 1.0, "b": 1.5}.items()}
    race(racers, runs=20, warmup=3, max_seconds=60)
    assert asked[:4] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert asked[4:] == [("a", 2), ("b", 2)] * 10
    assert racers["a"].latencies() == {"median_ms": 1.0, "p95_ms": 1.0, "min_ms": 1.0, "runs": 20}


def test_a_hopeless_engine_leaves_early_and_keeps_its_figures() -> None:
    asked: list[tuple[str, int]] = []
    racers = {name: Steady(ms, name, asked) for name, ms in {"a": 1.0, "b": 100.0}.items()}
    race(racers, runs=30, warmup=1, max_seconds=60)
    assert racers["a"].latencies()["runs"] == 30
    assert racers["b"].latencies() == {"median_ms": 100.0, "p95_ms": 100.0, "min_ms": 100.0, "runs": 3}


def test_quantiles_are_values_that_were_measured() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert (quantile(ordered, 0.5), quantile(ordered, 0.95), quantile([7.0], 0.95)) == (50.0, 95.0, 7.0)
