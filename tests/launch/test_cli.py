"""The command line: what it takes, what it says when it is mistaken, and the files it leaves."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.call import resolve
from launch.cli import main
from launch.run import Outcome
from launch.settings import describe
from launch.verbs import FREE, VERBS, Verb

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))  # not an installed copy
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setitem(VERBS, "toy", Verb("a toy", "toy_verb:main", "toy_verb:Settings", run=True, ranks=True))
    monkeypatch.chdir(tmp_path)


def outcome(folder: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "outcome.json").read_text())
    return found


def test_a_run_from_the_shell_to_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("toy.yaml").write_text("folder: a\nsteps: 3\n")
    assert main(["toy", "toy.yaml", "steps=4"]) == 0
    assert capsys.readouterr().out == "made: a toy\nnext: play with it\n"
    assert "steps: 4" in Path("a/settings.yaml").read_text()
    [start] = json.loads(Path("a/run.json").read_text())["starts"]
    assert start["command"] == ["axial", "toy", "toy.yaml", "steps=4"]
    assert outcome() | {"at": ""} == {
        "state": "done", "at": "", "made": ["a toy"], "next": ["play with it"], "error": "", "again": False,
    }  # fmt: skip
    assert main(["toy", "a/settings.yaml"]) == 0  # the folder's own settings are a valid CONFIG


@pytest.mark.parametrize(
    ("mode", "code", "line", "state"),
    [
        ("not_ok", 1, "", "failed"),
        ("mistake", 2, "axial toy: the toy is misused in toy.yaml\n", "failed"),
        ("disk", 2, "axial toy: No space left on device: shard.tar\n", "failed"),
        ("stopped", 130, "axial toy: stopped by SIGTERM after step 3\n", "stopped"),
        (
            "broken",
            2,
            "axial toy: needs the Python package package_that_is_not_there, which is not installed\n",
            "failed",
        ),
    ],
)
def test_each_end_has_its_code_and_its_line(
    capsys: pytest.CaptureFixture[str], mode: str, code: int, line: str, state: str
) -> None:
    assert main(["toy", "folder=a", f"mode={mode}"]) == code
    assert capsys.readouterr().err == line
    assert outcome()["state"] == state
    assert outcome()["error"] == line.removeprefix("axial toy: ").strip()


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="the toy is broken"):
        main(["toy", "folder=a", "mode=bug"])
    assert (outcome()["state"], outcome()["error"]) == ("failed", "RuntimeError: the toy is broken")


def test_debug_shows_the_traceback_of_a_users_mistake() -> None:
    with pytest.raises(ValueError, match="misused"):
        main(["toy", "folder=a", "mode=mistake", "--debug"])


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(settings: Any) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr("toy_verb.main", interrupt)
    assert main(["toy", "folder=a"]) == 130
    assert capsys.readouterr().err == "axial toy: interrupted; the same command goes on\n"
    assert outcome()["state"] == "stopped"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["pretrian"], "axial: no such verb 'pretrian'; did you mean 'pretrain'?"),
        (["toy", "--dryrun"], "axial: no such option --dryrun; did you mean '--dry-run'?"),
        (["toy", "--on"], "axial: --on needs the path of a cluster file"),
        (["toy", "a.yaml", "b.yaml"], "axial: one CONFIG is expected, got a.yaml and b.yaml; settings"),
        (["toy", "none.yaml"], "axial toy: no such settings file none.yaml"),
        (["toy", "folder=a", "stps=3"], "axial toy: 1 wrong setting(s) for toy_verb:\n  stps: no such setting"),
        (["toy", "folder=a", "--on", "nope.yaml"], "axial toy: no such settings file nope.yaml"),
        (["status", "--on", "here.yaml"], "axial status: status is quick and runs here; --on is for curate"),
        (["toy", "folder=file/run"], "axial toy: file is a file, so file/run cannot be the run folder"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_told_what_is_wrong(capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    Path("file").write_text("")
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(text)
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_folder_with_other_settings_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "folder=a"]) == 0
    assert main(["toy", "folder=a", "steps=2"]) == 0  # how long may change
    assert main(["toy", "folder=a", "rank=1"]) == 2
    err = capsys.readouterr().err
    assert "axial toy: a holds a run with other settings" in err
    assert "+rank: 1" in err
    assert outcome()["state"] == "done"  # the refused start leaves no mark


def test_dry_run_shows_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--dry-run", "folder=a", "mode=bug"]) == 0
    out = capsys.readouterr().out
    assert "folder: a\nmode: bug\n" in out
    assert "would be bug" in out
    assert not Path("a").exists()


def test_here_is_called_directly_from_main(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def target(settings: Any) -> Outcome:
        seen.extend(frame.name for frame in traceback.extract_stack() if frame.filename == cli.__file__)
        return Outcome()

    monkeypatch.setattr("toy_verb.main", target)
    assert main(["toy", "folder=a"]) == 0
    assert main(["toy", "folder=b", "--on", "here.yaml"]) == 0
    assert seen == ["main", "main"]


def test_elsewhere_the_same_words_do(capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.yaml").write_text("kind: processes\nprocesses: 2\n")
    assert main(["toy", "folder=a", "--on=two.yaml"]) == 0
    assert capsys.readouterr().out == "made: a toy\nnext: play with it\n"
    assert Path("a/was_here_1").exists()
    assert main(["toy", "folder=b", "mode=bug", "rank=1", "--on=two.yaml"]) == 1
    err = capsys.readouterr().err
    assert "raise RuntimeError" in err
    assert err.endswith("axial toy: rank 1 of 2: RuntimeError: the toy is broken\n")
    assert outcome("b") | {"at": ""} == {
        "state": "failed", "at": "", "made": [], "next": [], "again": False,
        "error": "rank 1 of 2: RuntimeError: the toy is broken",
    }  # fmt: skip
    assert main(["toy", "folder=c", "mode=mistake", "rank=1", "--on=two.yaml"]) == 2


def test_under_torchrun_only_rank_zero_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    Path("a").mkdir()
    assert main(["toy", "folder=a"]) == 0
    assert capsys.readouterr().out == ""
    assert [path.name for path in Path("a").iterdir()] == ["was_here_1"]


def test_help_lists_verbs_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out and verb.meaning in out for name, verb in VERBS.items())
    assert main([]) == 2
    assert main(["--version"]) == 0
    capsys.readouterr()
    assert main(["status", "--help"]) == 0
    out = capsys.readouterr().out
    assert "folder  path, default .\n" in out
    assert "how many folders deep" in out


def test_what_may_change_is_a_setting_of_some_run() -> None:
    keys = {row.key for verb in VERBS.values() if verb.run for row in describe(resolve(verb.settings))}
    keys |= {f"method.{row.key}" for row in describe(resolve("pretrain.methods.multi_teacher:Settings"))}
    assert [one for one in FREE if not any(key == one or key.startswith(f"{one}.") for key in keys)] == []


def test_every_verb_names_a_main_of_its_arguments_and_settings_with_a_folder() -> None:
    for name, verb in VERBS.items():
        model, target = resolve(verb.settings), resolve(verb.main)
        assert (verb.word or "folder") in model.model_fields, name
        assert list(inspect.signature(target).parameters) == ["settings", "crew"][: 1 + verb.crew], name
        assert set(verb.grows) <= set(model.model_fields), name
        assert not verb.grows or "extend" in model.model_fields, name


def test_a_word_that_is_no_file_fills_the_setting_of_the_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(VERBS, "toy", Verb("a toy", "toy_verb:main", "toy_verb:Settings", run=True, word="mode"))
    assert main(["toy", "stopped", "folder=a"]) == 130
    Path("fine").write_text("mode: not_ok\n")
    assert main(["toy", "fine", "folder=b"]) == 1  # a file of that name is the settings
    Path("c.yaml").write_text("mode: not_ok\n")
    assert main(["toy", "c.yaml", "folder=c"]) == 1
    capsys.readouterr()
    assert main(["toy", "d.yaml", "folder=d"]) == 2
    assert capsys.readouterr().err.startswith("axial toy: no such settings file d.yaml")
    assert main(["toy", "stoped", "folder=e"]) == 2
    assert "mode: " in capsys.readouterr().err
    assert main(["toy", "fine", "stopped"]) == 2
    assert "one CONFIG is expected, got fine and stopped" in capsys.readouterr().err
    assert main(["toy", "--help"]) == 0
    assert capsys.readouterr().out.startswith("axial toy [MODE | CONFIG.yaml] [key=value ...]: a toy\n")


def test_a_folder_may_be_called_by_a_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(VERBS, "toy", Verb("a toy", "toy_verb:main", "toy_verb:Settings", run=True, word="folder"))
    assert main(["toy", "20260101", "steps=1"]) == 0
    assert Path("20260101/run.json").exists()


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-u", "-c", "import sys, launch.cli; sys.exit(launch.cli.main(['--help']))"],
            stdout=pipe, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "axial: nobody reads the output any more\n")


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys, launch.cli\nassert launch.cli.main(['--help']) == 0\n"
        "heavy = {'torch', 'SimpleITK', 'monai', 'matplotlib', 'pyarrow', 'submitit', 'tensorboard', 'rich', 'numpy'}\n"
        "found = heavy & set(sys.modules)\nassert not found, found\nassert len(sys.modules) < 600, len(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_one_process_is_not_made_many(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "toy", Verb("a toy", "toy_verb:main", "toy_verb:Settings", run=True))
    assert main(["toy", "folder=c", "--on", "two_processes.yaml"]) == 2
    assert "two_processes.yaml starts 2 processes, and toy is one process" in capsys.readouterr().err


def test_a_verb_that_shares_out_tasks_is_given_who_does_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verb = Verb("a toy", "toy_verb:shared", "toy_verb:Settings", run=True, crew=True)
    monkeypatch.setitem(VERBS, "toy", verb)
    Path("many.yaml").write_text("kind: slurm\nnodes: 2\n")
    assert main(["toy", "folder=a"]) == 0
    assert main(["toy", "folder=b", "--on", "two_processes.yaml"]) == 0
    assert capsys.readouterr().out == "made: None\nmade: Workers(count=2, timeout_s=None, memory_gib=None)\n"
    assert outcome("b")["state"] == "done"
    assert main(["toy", "folder=c", "--on", "many.yaml"]) == 2
    assert "many.yaml starts 2 processes, and toy is one process" in capsys.readouterr().err
    assert main(["toy", "--help"]) == 0
    assert "With --on its tasks are shared out" in capsys.readouterr().out


def test_a_long_override_is_no_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "folder=a", f"mode={'x' * 300}"]) == 2
    assert "File name too long" not in capsys.readouterr().err


def test_a_verb_that_grows_says_so_and_lets_only_that_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scans = [{"name": "folder", "root": str(tmp_path), "id": name} for name in ("a", "b")]
    monkeypatch.setattr("data_curation.curate.main", lambda settings, crew=None: Outcome())
    first, both = (f"datasets={json.dumps(scans[:count])}" for count in (1, 2))
    assert main(["curate", "folder=c", first]) == 0
    Path("c/made").write_text("work")
    capsys.readouterr()
    assert main(["curate", "folder=c", both]) == 2
    assert "choose another folder=, add --extend, or put these back" in capsys.readouterr().err
    assert main(["curate", "folder=c", both, "--extend", "codec=b2"]) == 2
    assert "add --extend" not in capsys.readouterr().err
    assert main(["curate", "folder=c", both, "--extend"]) == 0
    assert main(["curate", "folder=c", both]) == 0
    assert main(["status", "folder=.", "--extend"]) == 2
    assert "status has nothing to extend" in capsys.readouterr().err
