"""What a `dataset.json` says of its labels: organs, the values that stand for them, regions, voxels to leave out.

CaseError (a ValueError): a data set, or a case of it, that cannot be used; its text names file, key or case, value and
remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EXAMPLE", "IGNORE", "CaseError", "Labels", "parse_labels", "told"]

IGNORE = 255  # class index of voxels that are neither learnt nor scored
EXAMPLE = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}'
_SHOWN = 10  # faults told in full; the rest are counted


class CaseError(ValueError):
    """A data-set folder or a case that cannot be used, with its remedy."""


@dataclass(frozen=True)
class Labels:
    """`organs`: name -> its label values, several for a region; `values`: class index -> label value, 0 first.

    `order` is nnU-Net's regions_class_order, the value written where each organ is found, later ones over earlier ones;
    empty where labels exclude one another. Voxels of the value `ignore` are neither learnt nor scored.
    """

    organs: Mapping[str, tuple[int, ...]]
    values: tuple[int, ...]
    ignore: int | None = None
    order: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each class index; a value that only regions hold is called `label N`."""
        single = {values[0]: name for name, values in self.organs.items() if len(values) == 1}
        return tuple("background" if value == 0 else single.get(value, f"label {value}") for value in self.values)

    def unnamed(self, present: Iterable[int]) -> str:
        """What to say of a label with these values, "" where each has a name."""
        known = [*self.values, *([] if self.ignore is None else [self.ignore])]
        unknown = sorted(set(present) - set(known))
        if not unknown:
            return ""
        return f"holds label value(s) {unknown[:5]}, dataset.json knows {known}; name them there, or correct the label"

    @property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """The label values that each output channel of the network stands for: classes, or regions that may overlap."""
        return tuple(self.organs.values()) if self.order else tuple((value,) for value in self.values)


def parse_labels(described: Mapping[str, Any], path: Path) -> Labels:
    """The labels of a `dataset.json`: version 2 has name -> value or list of values, version 1 value -> name."""
    organs: dict[str, tuple[int, ...]] = {}
    ignore: int | None = None
    for key, entry in described["labels"].items():
        name, given = (entry, key) if str(key).lstrip("-").isdigit() and isinstance(entry, str) else (key, entry)
        name, numbers = str(name), _numbers(given, f"{path}: label {key!r}: {entry!r}")
        if not numbers or not all(0 <= number <= 255 for number in numbers):
            raise CaseError(f"{path}: label {name!r} has value {given}; label maps are 8 bit, use 0 to 255")
        if name.lower() == "ignore":
            ignore = _ignored(given, numbers, path)
        elif set(numbers) != {0}:
            if name in organs:
                raise CaseError(f"{path}: two labels are called {name!r}; give each a name of its own")
            organs[name] = numbers
        elif isinstance(given, list):
            raise CaseError(f"{path}: label {name!r} has value {given}; the background is the number 0, not a list")
    values = (0, *sorted({value for numbers in organs.values() for value in numbers} - {0}))
    if len(values) < 2:
        raise CaseError(f"{path}: no label beside the background, such as {EXAMPLE}")
    if ignore is not None and ignore <= values[-1]:
        raise CaseError(
            f"{path}: the label `ignore` has value {ignore}, and {values[-1]} is in use; it must be the highest value, "
            f"such as {values[-1] + 1}"
        )
    return Labels(organs, values, ignore, _order(described, organs, path))


def _numbers(given: Any, what: str) -> tuple[int, ...]:
    try:
        found = tuple(int(value) for value in (given if isinstance(given, list) else [given]))
        whole = [float(value) for value in (given if isinstance(given, list) else [given])] == list(found)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise CaseError(f"{what} is neither a number nor a list of numbers; labels are whole numbers from 0 to 255")
    return found


def _ignored(given: Any, numbers: tuple[int, ...], path: Path) -> int:
    if isinstance(given, list):
        raise CaseError(f"{path}: the label `ignore` has the values {given}; it is one number, the highest of all")
    return numbers[0]


def _order(described: Mapping[str, Any], organs: Mapping[str, tuple[int, ...]], path: Path) -> tuple[int, ...]:
    """regions_class_order, one value an organ, where there are regions; nnU-Net too leaves it unread where not."""
    given = described.get("regions_class_order")
    if given is None or all(len(set(values)) == 1 for values in organs.values()):
        return ()
    if not isinstance(given, list):
        raise CaseError(f"{path}: regions_class_order is {given!r}; give a list, one value for each of {[*organs]}")
    order = _numbers(given, f"{path}: regions_class_order {given}")
    if len(order) != len(organs):
        raise CaseError(
            f"{path}: regions_class_order {given} has {len(order)} value(s) for {len(organs)} organ(s); give one for "
            f"each of {[*organs]}, in this order, none for the background"
        )
    for value, (name, values) in zip(order, organs.items(), strict=True):
        if value not in values:
            raise CaseError(
                f"{path}: regions_class_order writes {value} where {name!r} is found, which is none of its values "
                f"{list(values)}; its order is that of the labels, {[*organs]}"
            )
    return order


def told(heading: str, faults: Sequence[str]) -> str:
    """One text of many faults, the first ones in full."""
    rest = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "\n  ".join([heading + ":", *faults[:_SHOWN], *rest])
