"""Settings: what is read, what is refused and where it says so, and that what is dumped is read again as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from launch import settings as launch_settings
from launch.settings import Settings, SettingsError, choice, describe, dump, find, load, plugins

if TYPE_CHECKING:
    Decoder = Settings
else:
    Decoder = choice("toy_decoders")


class Optim(Settings):
    lr: float = Field(1e-3, gt=0, description="step size")
    betas: tuple[float, float] = (0.9, 0.95)


class Piece(Settings):
    path: Path
    shares: dict[str, float] = Field({})


class Run(Settings):
    folder: Path = Path("runs/a")
    steps: int = Field(10, gt=0, le=2**40, description="how long")
    name: str = ""
    fast: bool = False
    optim: Optim = Optim(lr=5e-4)
    pieces: list[Piece] = Field([])
    size: int | list[int] | None = None
    form: Literal["a", "b"] = "a"
    organs: dict[int, str] = Field({})


class WithDecoder(Settings):
    decoder: Decoder = Field(default=cast(Any, {"kind": "linear"}), description="what turns features into labels")
    terms: dict[str, Decoder] = Field(
        default=cast(Any, {"a": {"kind": "linear"}, "b": {"kind": "pyramid", "width": 9}})
    )
    other: Decoder | None = None


@pytest.fixture
def decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "modules" / "toy_decoders"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "_shared.py").write_text("raise RuntimeError('not a plug-in')")
    (folder / "plain.py").write_text("from launch.settings import Settings")
    for kind in ("linear", "pyramid"):
        (folder / f"{kind}.py").write_text(
            "from typing import Literal\n"
            "import launch.settings\n"
            "class Settings(launch.settings.Settings):\n"
            f"    kind: Literal['{kind}'] = '{kind}'\n"
            f"    width: int = 3\n"
            f"    {kind}_only: float = 0.5\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    plugins.cache_clear()
    for name in [name for name in sys.modules if name.startswith("toy_decoders")]:
        monkeypatch.delitem(sys.modules, name)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def mistakes(model: type[Settings], source: Path | None = None, *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(model, source, overrides)
    head, *lines = str(caught.value).splitlines()
    if lines:
        assert head == f"{len(lines)} wrong setting(s) for {model.__name__}:"
    return [line.strip() for line in lines] or [head]


def test_every_mistake_at_once_with_its_place(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: x\noptim:\n  lr: -1\nstps: 3\n")
    bad = write(tmp_path / "bad.yaml", "base: base.yaml\nsteps: -4\noptim:\n  lrr: 1e-4\npieces:\n  - shares: {a: b}\n")
    assert mistakes(Run, bad, "optim.betas=[0.9]", "form=c", "fast=3") == [
        f"steps: Input should be greater than 0, got -4  [{bad}:2]",
        "fast: Input should be a valid boolean, unable to interpret input, got 3  [override 'fast=3']",
        f"optim.lr: Input should be greater than 0, got -1  [{tmp_path / 'base.yaml'}:3]",
        "optim.betas.1: Field required  [override 'optim.betas=[0.9]']",
        f"optim.lrr: no such setting; did you mean 'lr'?  [{bad}:4]",
        f"pieces.0.path: Field required  [{bad}:6]",
        f"pieces.0.shares.a: Input should be a valid number, unable to parse string as a number, got 'b'  [{bad}:6]",
        "form: Input should be 'a' or 'b', got 'c'  [override 'form=c']",
        f"stps: no such setting; did you mean 'steps'?  [{tmp_path / 'base.yaml'}:4]",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("betas=1", "betas: no such setting; did you mean 'optim.betas'?"),
        ("zzz=1", "zzz: no such setting (there are: folder, steps, name, fast, optim, pieces, size, form, organs)"),
        ("steps", "key=value is expected"),
        ("=3", "key=value is expected"),
        ("optim..lr=3", "key=value is expected"),
        ("optim.betas.2=3", "optim.betas.2: optim.betas has 2 item(s), from 0"),
        ("optim.betas.x=3", "optim.betas.x: optim.betas has 2 item(s), from 0"),
        ("optim=3", "optim: a group of settings is expected, got 3"),
        ("steps.a=3", "steps: Input should be a valid integer, got {'a': 3}"),
        ("name=[", "name: not YAML: expected the node content, but found '<stream end>'"),
        ("name={a: 1, a: 2}", "name: a: written twice"),
        ("size=x", "size: Input should be a valid integer, unable to parse string as an integer, got 'x'; or "
                   "Input should be a valid list, got 'x'"),
        ("size=[1, x]", "size.1: Input should be a valid integer, unable to parse string as an integer, got 'x'"),
    ],
)  # fmt: skip
def test_an_override_is_named_in_its_mistake(override: str, expected: str) -> None:
    found = mistakes(Run, None, override)
    assert any(line.startswith(expected) and line.endswith(f"[override {override!r}]") for line in found), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 1\nname: a\nsteps: 2\n", "steps: written twice, first in line 1  [{path}:3]"),
        ("optim:\n  lr: 1\n  lr: 1\n", "optim.lr: written twice, first in line 2  [{path}:3]"),
        ("steps: [1\n", "not YAML: expected ',' or ']', but got '<stream end>'  [{path}:2]"),
        ("\tsteps: 1\n", "not YAML: found character '\\t' that cannot start any token  [{path}:1]"),
        ("- 1\n", "a settings file holds `key: value` lines, not one list  [{path}]"),
        (
            "name: !!python/name:os.system\n",
            "name: the YAML tag 'tag:yaml.org,2002:python/name:os.system' is not",
        ),
        ("pieces: &a\n  - *a\n", "pieces.0: refers to itself  [{path}:1]"),
        ("? [1]\n: 2\n", "the document: a key must be a single word  [{path}:1]"),
        ("base: 3\n", "base: the path of one YAML file is expected, got 3  [{path}:1]"),
        ("base: nowhere.yaml\n", "base: no such file {folder}/nowhere.yaml  [{path}:1]"),
        ("base: me.yaml\n", "base: {path} is based on this file, which is based on it  [{path}:1]"),
        ("name: \x07\n", "not YAML: "),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "me.yaml", text)
    found = mistakes(Run, path)
    assert any(line.startswith(expected.format(path=path, folder=tmp_path)) for line in found), found


def test_a_cycle_over_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert mistakes(Run, tmp_path / "a.yaml") == [
        f"base: {tmp_path / 'a.yaml'} is based on this file, which is based on it  [{tmp_path / 'b.yaml'}:1]"
    ]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "stage1.yaml", "")
    assert mistakes(Run, tmp_path / "stage.yaml") == [
        f"no such settings file {tmp_path / 'stage.yaml'}; did you mean 'stage1.yaml'?"
    ]
    assert "this is a folder; did you mean folder=" in mistakes(Run, tmp_path)[0]
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\n")
    assert mistakes(Run, tmp_path / "bytes.yaml") == [f"not UTF-8 text: byte 6 is 0xff  [{tmp_path / 'bytes.yaml'}]"]
    assert load(Run, write(tmp_path / "empty.yaml", "# nothing\n")) == Run()


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "optim: {lr: 1e-4}\nname: '1e-4'\nsteps: 12\n")
    assert load(Run, path) == Run(optim=Optim(lr=1e-4), name="1e-4", steps=12)
    # Of YAML 1.1 these would be false, a date, 45000 and 8.
    for text in ("no", "2026-11-21", "12:30:00", "010", "0x1f", "<<"):
        assert load(Run, None, [f"name={text}"]).name == text
    assert load(Run, None, ["optim.lr=.inf"]).optim.lr == float("inf")
    assert load(Run, None, ["steps=1e3"]).steps == 1000
    assert load(Run, None, ["name='a=b'"]).name == "a=b"


def test_base_then_file_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", "steps: 1\nname: root\noptim: {betas: [0.1, 0.2]}\n")
    write(tmp_path / "middle.yaml", "base: root.yaml\nname: middle\n")
    top = write(tmp_path / "sub/top.yaml", "base: ../middle.yaml\noptim: {lr: 2}\n")
    got = load(Run, top, ["optim.betas.1=0.3", "optim.lr=3", "optim.lr=4"])
    assert got == Run(steps=1, name="middle", optim=Optim(lr=4, betas=(0.1, 0.3)))


def test_a_part_of_a_group_keeps_the_rest_of_the_default() -> None:
    assert load(Run, None, ["optim.betas.0=0.5"]).optim == Optim(lr=5e-4, betas=(0.5, 0.95))
    assert Run.model_validate({"optim": {"betas": (0.5, 0.6)}}).optim.lr == 5e-4


def test_lists_maps_and_null() -> None:
    got = load(
        Run, None, ["pieces=[{path: a}, {path: b}]", "pieces.1.shares.x=0.5", "size=[1, 2]", "organs={1: liver}"]
    )
    assert got.pieces == [Piece(path=Path("a")), Piece(path=Path("b"), shares={"x": 0.5})]
    assert got.organs == {1: "liver"}
    assert load(Run, None, ["organs={1: liver}", "organs.1=spleen"]).organs == {1: "spleen"}
    assert load(Run, None, ["size=3", "size=null"]).size is None
    assert load(Run, None, ["size="]).size is None


def test_packaged_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("here.yaml").parent.name == "clusters"
    write(tmp_path / "here.yaml", "")
    assert find("here.yaml") == Path("here.yaml")
    assert find("x/here.yaml") == Path("x/here.yaml")
    assert find("nothing.yaml") == Path("nothing.yaml")
    path = write(tmp_path / "mine.yaml", "base: two_processes.yaml\n")
    assert "kind: no such setting" in mistakes(Run, path)[0]
    monkeypatch.setattr(launch_settings, "CONFIGS", ("a_package_that_is_not_there",))
    assert find("two_processes.yaml") == Path("two_processes.yaml")


@pytest.mark.usefixtures("decoders")
def test_a_choice_is_made_by_kind(tmp_path: Path) -> None:
    assert list(plugins("toy_decoders")) == ["linear", "pyramid"]
    default = load(WithDecoder)
    assert default.decoder.model_dump() == {"kind": "linear", "width": 3, "linear_only": 0.5}
    got = load(
        WithDecoder, None, ["decoder.pyramid_only=2", "decoder.kind=pyramid", "terms.b.width=1", "terms.a.width=2"]
    )
    assert got.decoder.model_dump() == {"kind": "pyramid", "width": 3, "pyramid_only": 2.0}
    assert {name: term.model_dump()["width"] for name, term in got.terms.items()} == {"a": 2, "b": 1}
    assert load(WithDecoder, write(tmp_path / "dump.yaml", dump(got))) == got
    assert WithDecoder(decoder=got.decoder).decoder is got.decoder
    part = load(WithDecoder, write(tmp_path / "part.yaml", "decoder: {width: 8}"))  # the kind is the default's
    assert part.decoder.model_dump() == {"kind": "linear", "width": 8, "linear_only": 0.5}


@pytest.mark.usefixtures("decoders")
def test_another_kind_leaves_the_keys_of_the_first_behind(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "decoder: {kind: linear, linear_only: 3}\n")
    path = write(tmp_path / "top.yaml", "base: base.yaml\ndecoder: {kind: pyramid}\n")
    assert load(WithDecoder, path).decoder.model_dump() == {"kind": "pyramid", "width": 3, "pyramid_only": 0.5}
    assert load(WithDecoder, tmp_path / "base.yaml", ["decoder.kind=pyramid"]) == load(WithDecoder, path)


@pytest.mark.usefixtures("decoders")
def test_mistakes_inside_a_choice_have_their_place(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml", "decoder:\n  kind: liner\nterms:\n  x:\n    kind: linear\n    linear_onl: 1\n  y: {}\n"
    )
    assert mistakes(WithDecoder, path, "other=3", "terms.z={kind: pyramid, width: a}") == [
        f"decoder.kind: no such kind 'liner'; did you mean 'linear'? (allowed: linear, pyramid)  [{path}:2]",
        f"terms.x.linear_onl: no such setting; did you mean 'linear_only'?  [{path}:6]",
        f"terms.y.kind: must be named; allowed: linear, pyramid  [{path}:7]",
        "terms.z.width: Input should be a valid integer, unable to parse string as an integer, got 'a'  "
        "[override 'terms.z={kind: pyramid, width: a}']",
        "other: a group with its kind is expected, one of linear, pyramid  [override 'other=3']",
    ]


@pytest.mark.usefixtures("decoders")
def test_describe_lists_every_setting_and_the_kinds() -> None:
    rows = {row.key: (row.type, row.default, row.meaning) for row in describe(WithDecoder)}
    assert rows["decoder.kind"] == ("linear | pyramid", "linear", "what turns features into labels")
    assert rows["decoder[pyramid].pyramid_only"] == ("float", "0.5", "")
    assert rows["terms.<name>.kind"] == ("linear | pyramid", "a, b", "")
    assert rows["other.kind"] == ("linear | pyramid", "null", "")
    plain = {row.key: (row.type, row.default, row.meaning) for row in describe(Run)}
    assert plain["steps"] == ("int > 0, <= 1099511627776", "10", "how long")
    assert plain["optim.lr"] == ("float > 0", "0.0005", "step size")
    assert plain["pieces.<n>.path"] == ("path", "required", "")
    assert plain["size"] == ("int | list of int | null", "null", "")
    assert plain["form"] == ("a | b", "a", "")
    assert plain["organs"] == ("map of int, text", "none", "")


def test_what_a_model_itself_refuses_is_told_in_its_words() -> None:
    class Range(Settings):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def _ordered(self) -> Range:
            if self.low > self.high:
                raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
            return self

    class Outer(Settings):
        window: Range = Range()

    assert mistakes(Outer, None, "window.low=3") == [
        "window: low (3) must not be above high (1)  [override 'window.low=3']"
    ]
    assert mistakes(Range, None, "low=3") == ["low (3) must not be above high (1)"]


def test_settings_are_frozen_and_defaults_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run().steps = 3  # type: ignore[misc]

    class Wrong(Settings):
        steps: int = Field(-1, gt=0)

    assert mistakes(Wrong) == ["steps: Input should be greater than 0, got -1"]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(min_value=1e-300, allow_nan=False, allow_infinity=True)
PATHS = TEXT.filter(lambda text: "\0" not in text).map(Path)
RUNS: Any = st.builds(
    Run,
    folder=PATHS,
    steps=st.integers(1, 2**40),
    name=TEXT
    | st.sampled_from(["null", "~", "1e-4", "007", "true", "- a", "a: b", "#", "", " x ", "a\nb\n", "\u2028"]),
    fast=st.booleans(),
    optim=st.builds(Optim, lr=NUMBER, betas=st.tuples(NUMBER, NUMBER)),
    pieces=st.lists(st.builds(Piece, path=PATHS, shares=st.dictionaries(TEXT, NUMBER, max_size=3)), max_size=3),
    size=st.none() | st.integers() | st.lists(st.integers(), max_size=4),
    form=st.sampled_from(["a", "b"]),
    organs=st.dictionaries(st.integers(0, 255), TEXT, max_size=3),
)


@given(run=RUNS)
@hypothesis_settings(deadline=None, max_examples=150)
def test_what_is_dumped_is_read_again_as_it_was(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(run), encoding="utf-8")
    assert load(Run, path) == run
    assert dump(load(Run, path)) == dump(run)
