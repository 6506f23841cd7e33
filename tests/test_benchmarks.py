"""What the benchmarks reckon with: their helpers, not their times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.settings import load
from pretrain.settings import Settings
from tests.benchmarks import peer
from tests.benchmarks.bench_scaling import Links, communication, traffic
from tests.benchmarks.bench_step import ON_CPU, SAME, Row
from tests.benchmarks.turns import SideFailed, take_turns

SERVE = "from tests.benchmarks.turns import serve; import itertools; n = itertools.count(1)\n"
REPOSITORY = Path(__file__).resolve().parent.parent


def side(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{SERVE}{code}"]


def test_a_folder_without_the_official_code_is_said(tmp_path: Path) -> None:
    with pytest.raises(peer.PeerError, match=r"holds no package `dinov3`: give the folder of a checkout"):
        peer.load(tmp_path)


def test_a_step_that_the_official_code_has_not_is_refused() -> None:
    settings = load(Settings, None, [*SAME, *ON_CPU, "model.in_channels=1", "data.crops.n_local=0"])
    with pytest.raises(peer.PeerError, match=r"in_channels is not 3, data\.crops\.n_local is 0"):
        peer.config(settings)


def test_sides_answer_by_turns_and_what_they_print_is_no_answer() -> None:
    code = 'print("noise"); serve({"name": NAME}, lambda: (print("more"), {"turn": next(n)})[1])'
    commands = {name: side(code.replace("NAME", repr(name))) for name in ("a", "b")}
    with pytest.raises(ValueError):  # noise before the answers are set up is no JSON
        take_turns(commands, 1)
    quiet = {name: [*command[:-1], command[-1].replace('print("noise"); ', "")] for name, command in commands.items()}
    ready, answers = take_turns(quiet, 3)
    assert ready == {"a": {"name": "a"}, "b": {"name": "b"}}
    assert answers == {name: [{"turn": turn} for turn in (1, 2, 3)] for name in ("a", "b")}


def test_a_side_that_dies_says_why() -> None:
    with pytest.raises(SideFailed, match=r"the side 'a' ended with code 1:(.|\n)*out of luck"):
        take_turns({"a": side("serve({}, lambda: exec(\"raise RuntimeError('out of luck')\"))")}, 1)


def test_rows_are_medians() -> None:
    answers = [{"wall": wall, "cpu": 2 * wall, "memory": 10 * wall} for wall in (3.0, 1.0, 50.0)]
    assert Row.of(4, answers) == Row(4, 3.0, 6.0, 30.0)


def test_traffic_is_that_of_rings() -> None:
    """100 M trained and 100 M frozen parameters: 400 MB each."""
    assert traffic(1e8, 1e8, 1, "full") == (0.0, 0.0)
    assert traffic(1e8, 1e8, 8, "replicate") == (pytest.approx(2 * 4e8 * 7 / 8), 0.0)
    assert traffic(1e8, 1e8, 8, "full") == traffic(1e8, 1e8, 8, "hybrid") == (pytest.approx(4 * 4e8 * 7 / 8), 0.0)
    assert traffic(1e8, 1e8, 64, "full") == (0.0, pytest.approx(4 * 4e8 * 63 / 64))
    inside, between = traffic(1e8, 1e8, 64, "hybrid")
    assert inside == pytest.approx(4 * 4e8 * 7 / 8)
    assert between == pytest.approx(2 * 4e8 / 8 * 7 / 8)
    assert communication((450e9, 50e9), Links()) == pytest.approx(2.0)
