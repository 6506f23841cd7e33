"""Pretraining whose second rank can be held back: it reads no slice while the run folder holds a file ``hold``."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from data_curation.corpus import Corpus
from launch.run import Outcome
from pretrain import train
from pretrain.settings import Settings


def main(settings: Settings) -> Outcome:
    """As `pretrain.train.main`; leaves a file ``heard`` when a rank that is held back has been warned."""
    honest = Corpus.hu

    def held(corpus: Corpus, i: int) -> Any:
        while os.environ["RANK"] == "1" and (settings.folder / "hold").exists():
            stop = getattr(signal.getsignal(signal.SIGUSR2), "__self__", None)
            if getattr(stop, "name", "") == "SIGUSR2":
                (settings.folder / "heard").touch()
            time.sleep(0.05)
        return honest(corpus, i)

    Corpus.hu = held  # type: ignore[method-assign]  # the test's own process
    return train.main(settings)
