"""The table of verbs: what each is called, where its function and settings are, and what a run of it may change."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FREE", "VERBS", "Verb"]


@dataclass(frozen=True)
class Verb:
    """One command: where its function and settings are, and whether its folder is a run folder that it fills."""

    meaning: str
    main: str
    settings: str
    run: bool = False
    ranks: bool = False  # several processes may share its work
    crew: bool = False  # stays here and shares out tasks: with --on its main is given who does them
    word: str = ""  # setting that the word after the verb fills, where that word is no settings file
    grows: tuple[str, ...] = ()  # settings that may differ from those of its folder where --extend is given


VERBS = {
    "demo": Verb("the whole way in minutes, without data", "downstream.demo:main", "downstream.demo:Settings"),
    "catalogue": Verb(
        "the public CT sets: licences, how to obtain one, what of it is there",
        "data_curation.obtain:main",
        "data_curation.obtain:Settings",
        word="name",
    ),
    "curate": Verb(
        "public CT sets -> a corpus of shards",
        "data_curation.curate:main",
        "data_curation.curate:Settings",
        run=True,
        crew=True,
        grows=("datasets", "evaluation"),
    ),
    "report": Verb("what is in a corpus: HTML, PNG", "data_curation.report:main", "data_curation.report:Settings"),
    "verify": Verb(
        "is every byte of a corpus what it was?", "data_curation.verify:main", "data_curation.verify:Settings"
    ),
    "pretrain": Verb(
        "a corpus -> a backbone", "pretrain.train:main", "pretrain.settings:Settings", run=True, ranks=True
    ),
    "features": Verb(
        "what a recipe's frozen teachers make of a corpus, for any number of students",
        "pretrain.features:main",
        "pretrain.settings:Settings",
        run=True,
        ranks=True,
    ),
    "export": Verb(
        "a pretraining run -> one safetensors file, or a folder for transformers",
        "pretrain.export:main",
        "pretrain.export:Settings",
    ),
    "convert": Verb(
        "a public set with labels -> nnU-Net's raw format",
        "downstream.convert:main",
        "downstream.convert:Settings",
        run=True,
        word="name",
    ),
    "plan": Verb(
        "a labelled data set -> its fingerprint, and settings to fine-tune with",
        "downstream.plan:main",
        "downstream.plan:Settings",
    ),
    "finetune": Verb(
        "a backbone + labels -> a segmentation model",
        "downstream.finetune:main",
        "downstream.finetune:Settings",
        run=True,
        ranks=True,
    ),
    "predict": Verb(
        "a model + scans -> label maps", "downstream.predict:main", "downstream.predict:Settings", run=True, ranks=True
    ),
    "onnx": Verb(
        "a segmentation model -> one ONNX file", "downstream.onnx:main", "downstream.onnx:Settings", word="model"
    ),
    "evaluate": Verb(
        "label maps -> Dice, NSD, HD95", "downstream.evaluate:main", "downstream.evaluate:Settings", run=True
    ),
    "compare": Verb(
        "two sets of scores, paired: is one better?", "downstream.compare:main", "downstream.compare:Settings"
    ),
    "probe": Verb(
        "how well a backbone's patches tell organs apart: k-NN, linear, few shots",
        "downstream.probe:main",
        "downstream.probe:Settings",
        run=True,
    ),
    "status": Verb("how the runs in a folder are doing", "launch.status:main", "launch.status:Settings", word="folder"),
    "logs": Verb("what a run has printed, or prints", "launch.logs:main", "launch.logs:Settings", word="folder"),
    "cancel": Verb(
        "end the runs in a folder, wherever they wait or run; they save first",
        "launch.cancel:main",
        "launch.cancel:Settings",
        word="folder",
    ),
}

# What may change when a run goes on: how fast and where it is, what is told of it, and how much of it is done: steps
# (schedules follow), the share of a part.
FREE = (
    "steps", "share", "device", "workers", "data.workers", "data.prefetch", "data.start_method", "data.max_unreadable",
    "data.max_unreadable_share", "data.max_worker_deaths", "patches.workers", "patches.ahead", "prepare_workers",
    "timeout_s", "memory_gib", "extend", "parallel", "checkpoint", "log", "watch", "watchdog", "gc_every", "max_bad",
    "method.cache", "cache", "window.memory_gib", "window.batch_size",
)  # fmt: skip
