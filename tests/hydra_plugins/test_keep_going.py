"""The sweeper: every job once, whatever the launcher gives back and whenever, and refusals that help."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from callbacks.run_lease import run_lease
from callbacks.sweep_plan import PlannedJob, lease, read_plan
from hydra_plugins.calibrant_sweeper import keep_going
from tests.callbacks.sweeps import record, write
from tests.configuration import CONF

Launch = Callable[[Sequence[Sequence[str]]], list[JobReturn]]


class Launcher:
    """Runs nothing; gives back what it is told, for each job or at the end."""

    def __init__(self, answer: Launch) -> None:
        self.answer, self.launched = answer, []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.launched.append((initial_job_idx, [list(job) for job in jobs]))
        return self.answer(jobs)


def ended(job: Sequence[str], error: BaseException | str | None = None) -> JobReturn:
    status = JobStatus.COMPLETED if error is None else JobStatus.FAILED
    return JobReturn(overrides=list(job), status=status, _return_value=error)


class Ends:
    """A callback that counts."""

    def __init__(self) -> None:
        self.count = 0

    def on_multirun_end(self, **kwargs: Any) -> None:
        self.count += 1


@pytest.fixture
def prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[keep_going.KeepGoingSweeper, Launcher, Ends]]]:
    monkeypatch.chdir(tmp_path)

    def prepare(
        *line: str, answer: Launch | None = None, **options: Any
    ) -> tuple[keep_going.KeepGoingSweeper, Launcher, Ends]:
        Plugins.instance()  # which executes the modules of all plugins anew
        setup_globals()
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", list(line), RunMode.MULTIRUN)
        launcher, counted = Launcher(answer or (lambda jobs: [ended(job) for job in jobs])), Ends()
        callbacks = Callbacks()
        callbacks.callbacks.append(counted)  # pyright: ignore
        monkeypatch.setattr("hydra.core.plugins.Plugins.instantiate_launcher", lambda *_, **__: launcher, raising=True)
        sweeper = keep_going.KeepGoingSweeper(**({"max_batch_size": None} | options))
        context = HydraContext(config_loader=loader, callbacks=callbacks)
        sweeper.setup(hydra_context=context, task_function=lambda cfg: None, config=config)
        return sweeper, launcher, counted

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield prepare


def task(sweeper: keep_going.KeepGoingSweeper) -> list[str]:
    assert isinstance(sweeper.config, DictConfig)
    return list(OmegaConf.to_container(sweeper.config.hydra.overrides.task, resolve=False))  # pyright: ignore


SHORT = ("seed=0,1", "hydra.sweep.dir=sweep")
LINE = ("bits=w4a4,w2a4", "seed=0,1", "hydra.sweep.dir=sweep")


def test_the_jobs_are_those_of_hydras_sweeper_in_its_order(prepared: Callable[..., Any]) -> None:
    sweeper, launcher, _ = prepared(*LINE)
    sweeper.sweep(task(sweeper))
    (first, jobs), *others = launcher.launched
    parsed = OverridesParser.create().parse_overrides(list(LINE[:2]))
    assert (first, others) == (0, [])
    assert [[o for o in job if not o.startswith("hydra.")] for job in jobs] == BasicSweeper.split_arguments(
        parsed, None
    )[0]
    assert len({o for job in jobs for o in job if o.startswith("hydra.sweep.subdir=")}) == 4


def test_folders_are_those_that_were_asked_for(prepared: Callable[..., Any]) -> None:
    inside = "+callbacks.own={folder:'${paths.output}'}"  # known to jobs alone
    sweeper, launcher, _ = prepared(*SHORT, inside, "hydra.sweep.subdir=job_${hydra.job.num}")
    sweeper.sweep(task(sweeper))
    plan = read_plan(Path("sweep"))
    assert plan is not None
    assert [job.folder for job in plan.jobs] == ["job_0", "job_1"]
    for number, job in enumerate(launcher.launched[0][1]):
        assert [o for o in job if "subdir" in o] == [f"hydra.sweep.subdir='job_{number}'"]


def test_batches_are_no_larger_than_asked(prepared: Callable[..., Any]) -> None:
    sweeper, launcher, _ = prepared(*LINE, max_batch_size=3)
    sweeper.sweep(task(sweeper))
    assert [(first, len(jobs)) for first, jobs in launcher.launched] == [(0, 3), (3, 1)]


def test_failed_jobs_fail_the_sweep_after_all_have_run(prepared: Callable[..., Any]) -> None:
    def answer(jobs: Sequence[Sequence[str]]) -> list[JobReturn]:
        return [ended(job, ValueError("no") if "seed=0" in job else None) for job in jobs]

    sweeper, launcher, counted = prepared(*SHORT, answer=answer, max_batch_size=1)
    with pytest.raises(SystemExit) as raised:
        sweeper.sweep(task(sweeper))
    assert raised.value.code == 1
    assert len(launcher.launched) == 2
    assert counted.count == 1
    plan = read_plan(Path("sweep"))
    assert plan is not None
    assert [job.status for job in plan.jobs] == ["failed", "ended"]
    assert plan.jobs[0].error == "ValueError: no"


def test_a_launcher_that_raises_fails_what_it_has_not_finished(prepared: Callable[..., Any]) -> None:
    turns = itertools.count()

    def answer(jobs: Sequence[Sequence[str]]) -> list[JobReturn]:
        if next(turns) == 0:
            plan = read_plan(Path("sweep"))
            assert plan is not None
            write(Path("sweep"), plan.jobs[1].folder, record(config_hash=plan.jobs[1].config_hash))
            raise RuntimeError("the cluster is away")
        return [ended(job) for job in jobs]

    sweeper, _, counted = prepared("seed=0,1,2", "hydra.sweep.dir=sweep", answer=answer, max_batch_size=2)
    with pytest.raises(SystemExit):
        sweeper.sweep(task(sweeper))
    plan = read_plan(Path("sweep"))
    assert plan is not None
    assert [(job.status, job.error) for job in plan.jobs] == [
        ("failed", "RuntimeError: the cluster is away"),
        ("ended", None),
        ("ended", None),
    ]
    assert counted.count == 1


def test_a_job_without_a_result_has_failed(prepared: Callable[..., Any]) -> None:
    sweeper, _, _ = prepared(*SHORT, answer=lambda jobs: [ended(jobs[0])])
    with pytest.raises(SystemExit):
        sweeper.sweep(task(sweeper))
    assert [job.status for job in read_plan(Path("sweep")).jobs] == ["ended", "failed"]  # pyright: ignore


def test_an_interrupted_sweep_reports_and_leaves_no_lock(prepared: Callable[..., Any]) -> None:
    def answer(jobs: Sequence[Sequence[str]]) -> list[JobReturn]:
        raise KeyboardInterrupt

    sweeper, _, counted = prepared(*SHORT, answer=answer)
    with pytest.raises(KeyboardInterrupt):
        sweeper.sweep(task(sweeper))
    assert counted.count == 1
    assert not list(Path("sweep").glob("*.lock"))


def test_a_mistake_in_one_job_is_found_before_any_runs(prepared: Callable[..., Any]) -> None:
    sweeper, launcher, counted = prepared("bits=w4a4,w1a1", "hydra.sweep.dir=sweep")
    with pytest.raises(Exception, match="w1a1"):
        sweeper.sweep(task(sweeper))
    assert launcher.launched == []
    assert counted.count == 0


def test_what_is_asked_for_twice_runs_once(prepared: Callable[..., Any]) -> None:
    sweeper, launcher, _ = prepared("seed=0,1,0", "hydra.sweep.dir=sweep")
    sweeper.sweep(task(sweeper))
    assert len(launcher.launched[0][1]) == 2


def test_a_resumed_sweep_runs_what_no_record_of_this_configuration_has_finished(prepared: Callable[..., Any]) -> None:
    sweeper, _, _ = prepared(*LINE)
    sweeper.sweep(task(sweeper))
    plan = read_plan(Path("sweep"))
    assert plan is not None
    states = ["finished", "running", "finished"]
    for job, status in zip(plan.jobs, states, strict=False):
        write(Path("sweep"), job.folder, record(status=status, config_hash=job.config_hash, overrides=job.overrides))
    write(Path("sweep"), plan.jobs[3].folder, record(config_hash="altered", overrides=plan.jobs[3].overrides))
    sweeper, launcher, _ = prepared(*LINE, "sweep.resume=true")
    sweeper.sweep(task(sweeper))
    (jobs,) = [jobs for _, jobs in launcher.launched]
    begun = str(Path("sweep").absolute() / plan.jobs[1].folder)
    assert [[o for o in job if o.startswith("resume=")] for job in jobs] == [[f"resume='{begun}'"], []]
    assert [job[:2] for job in jobs] == [["bits=w4a4", "seed=1"], ["bits=w2a4", "seed=1"]]
    assert (Path("sweep") / "superseded" / plan.jobs[3].folder / "record_superseded.json").exists()
    assert [job.status for job in read_plan(Path("sweep")).jobs] == ["done", "ended", "done", "ended"]  # pyright: ignore


def test_without_resume_everything_runs(prepared: Callable[..., Any]) -> None:
    for _ in range(2):
        sweeper, launcher, _ = prepared(*SHORT)
        sweeper.sweep(task(sweeper))
        assert len(launcher.launched[0][1]) == 2


def test_there_must_be_a_sweep_to_go_on_with(prepared: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"sweep\.resume: expected an earlier sweep"):
        prepared("seed=0,1", "sweep.resume=true")
    sweeper, _, _ = prepared("seed=0,1", "sweep.resume=true", "hydra.sweep.dir=new")
    assert sweeper.folder == Path("new").absolute()


def test_an_unrelated_sweep_does_not_grow(prepared: Callable[..., Any]) -> None:
    sweeper, _, _ = prepared("bits=w4a4,w2a4", "generator=zeroq", "hydra.sweep.dir=multirun/first")
    sweeper.sweep(task(sweeper))
    for other in (["seed=0,1"], ["bits=w4a4,w2a4", "generator=dsg"], ["bits=w4a4,w2a4"]):
        with pytest.raises(ValueError, match=r"sweep\.resume: expected an earlier sweep of these overrides"):
            prepared(*other, "sweep.resume=true")
    for more in (["generator=zeroq", "bits=w4a4,w3a3,w2a4"], ["bits=w2a4,w4a4", "generator=zeroq"]):
        assert prepared(*more, "sweep.resume=true")[0].folder.name == "first"


def test_the_last_sweep_of_the_line_is_found(prepared: Callable[..., Any]) -> None:
    folders = []
    for line in (["seed=0,1", "bits=w4a4"], ["seed=2,3"]):
        sweeper, _, _ = prepared(*line, f"hydra.sweep.dir=multirun/{len(folders)}")
        sweeper.sweep(task(sweeper))
        folders.append(sweeper.folder)
    sweeper, _, _ = prepared("bits=w4a4", "seed=0,1", "sweep.resume=true")
    assert sweeper.folder == folders[0]
    assert sweeper.config.hydra.sweep.dir == str(folders[0])


def test_a_running_sweep_is_not_run_twice(prepared: Callable[..., Any]) -> None:
    sweeper, launcher, _ = prepared(*SHORT)
    who = f"still running: process {os.getpid()} on {socket.gethostname()}"
    with lease(Path("sweep").absolute()).held(0), pytest.raises(ValueError, match=who):
        sweeper.sweep(task(sweeper))
    assert launcher.launched == []


def begun(prepared: Callable[..., Any], *line: str, **facts: Any) -> list[PlannedJob]:
    """A sweep that has run, each of its jobs with a record."""
    sweeper, _, _ = prepared(*line)
    sweeper.sweep(task(sweeper))
    plan = read_plan(Path("sweep"))
    assert plan is not None
    for job in plan.jobs:
        written = record(config_hash=job.config_hash, overrides=job.overrides, **facts)
        write(Path("sweep"), job.folder, written)
    return plan.jobs


def resumed(prepared: Callable[..., Any], *line: str) -> list[list[str]]:
    """What a sweep launches that goes on."""
    sweeper, launcher, _ = prepared(*line, "sweep.resume=true")
    sweeper.sweep(task(sweeper))
    return [job for _, jobs in launcher.launched for job in jobs]


def folder_of(job: Sequence[str]) -> str:
    return next(o.partition("=")[2].strip("'") for o in job if o.startswith("hydra.sweep.subdir="))


@pytest.mark.parametrize("resume", [(), ("sweep.resume=true",)])
def test_a_sweep_whose_job_still_runs_is_not_gone_on_with(
    prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, resume: Sequence[str]
) -> None:
    jobs = begun(prepared, *SHORT, status="running")
    monkeypatch.setattr("hydra_plugins.calibrant_sweeper._folders.STOPPING_S", 0.3)
    sweeper, launcher, counted = prepared(*SHORT, *resume)
    who = f"process {os.getpid()} on {socket.gethostname()} in {jobs[1].folder}; wait for them, or stop them"
    with run_lease(Path("sweep") / jobs[1].folder).held(0), pytest.raises(ValueError, match=who):
        sweeper.sweep(task(sweeper))
    assert (launcher.launched, counted.count) == ([], 0)
    assert (Path("sweep") / jobs[1].folder / "record.json").exists()
    assert not list(Path("sweep").glob("**/*.lock"))


def test_a_sweep_of_which_slurm_has_jobs_is_not_gone_on_with(
    prepared: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(prepared, *SHORT, status="running")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 7_1\necho 8\necho 9_3\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    table = Path("sweep/.submitit/jobs.csv")
    table.parent.mkdir()
    table.write_text("job,slurm_id,overrides,log\n0,7_0,seed=0,a\n1,7_1,seed=1,b\n2,8,seed=2,c\n")
    with pytest.raises(
        ValueError, match=r"2 of an earlier go run or wait; wait for them, or end them with: scancel 7_1 8$"
    ):
        resumed(prepared, *SHORT)
    squeue.write_text("#!/bin/sh\necho 9_3\n")
    assert len(resumed(prepared, *SHORT)) == 2
    squeue.write_text("#!/bin/sh\nexit 1\n")  # Slurm does not answer
    assert len(resumed(prepared, *SHORT)) == 2


def test_what_a_finished_run_lacks_is_its_export(prepared: Callable[..., Any]) -> None:
    jobs = begun(prepared, *SHORT)
    assert resumed(prepared, *SHORT) == []
    again = resumed(prepared, *SHORT, "export=onnx")
    places = [Path("sweep").absolute() / job.folder for job in jobs]
    assert [[o for o in job if o.startswith("resume=")] for job in again] == [[f"resume='{place}'"] for place in places]
    for place in places:
        facts = json.loads((place / "record.json").read_text())
        facts["config"]["export"] = read_plan(Path("sweep")).jobs[-1].export  # pyright: ignore
        assert facts["config"]["export"]["container"] == "auto"
        (place / "record.json").write_text(json.dumps(facts))
    assert resumed(prepared, *SHORT, "export=onnx") == []
    assert len(resumed(prepared, *SHORT, "export=onnx", "export.container=int4")) == 2
    assert resumed(prepared, *SHORT) == []  # which has more than it asks for


NUMBERED = ("hydra.sweep.dir=sweep", "hydra.sweep.subdir=job/${hydra.job.num}")


def test_in_another_order_numbers_are_the_folders_of_other_jobs(prepared: Callable[..., Any]) -> None:
    begun(prepared, "seed=0,1", *NUMBERED)
    (job,) = resumed(prepared, "seed=5,0,1", *NUMBERED)
    assert job[0] == "seed=5"
    assert folder_of(job) == "job/0_2"
    assert len(list(Path("sweep").glob("job/*/record.json"))) == 2
    assert not (Path("sweep") / "superseded").exists()
    assert {j.folder: j.overrides[0] for j in read_plan(Path("sweep")).jobs} == {  # pyright: ignore
        "job/0": "seed=0", "job/1": "seed=1", "job/0_2": "seed=5",
    }  # fmt: skip


def test_a_sweep_that_grows_by_another_line_keeps_its_numbered_jobs(prepared: Callable[..., Any]) -> None:
    begun(prepared, "seed=0,1", *NUMBERED)
    assert [folder_of(job) for job in resumed(prepared, "seed=2,3", *NUMBERED)] == ["job/0_2", "job/1_2"]
    assert len(list(Path("sweep").glob("job/*/record.json"))) == 2


def test_a_changed_configuration_in_a_nested_folder_moves_what_was_there(prepared: Callable[..., Any]) -> None:
    for job in begun(prepared, "seed=0,1", *NUMBERED):
        path = Path("sweep") / job.folder / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "altered"}))
    assert [folder_of(job) for job in resumed(prepared, "seed=0,1", *NUMBERED)] == ["job/0", "job/1"]
    assert len(list(Path("sweep").glob("superseded/job/*/record_superseded.json"))) == 2


def test_failures_of_jobs_that_were_not_asked_for_do_not_fail_a_sweep(prepared: Callable[..., Any]) -> None:
    def answer(jobs: Sequence[Sequence[str]]) -> list[JobReturn]:
        return [ended(job, "no" if "seed=1" in job else None) for job in jobs]

    sweeper, _, _ = prepared("seed=0,1", "hydra.sweep.dir=sweep", answer=answer)
    with pytest.raises(SystemExit):
        sweeper.sweep(task(sweeper))
    assert [job[0] for job in resumed(prepared, "seed=0", "hydra.sweep.dir=sweep")] == ["seed=0"]
    assert [job.status for job in read_plan(Path("sweep")).jobs] == ["ended", "failed"]  # pyright: ignore


@pytest.mark.parametrize("value", ["a b", "it's", "x=1,y=2", "{a}", "[b]", "back\\slash", "end\\"])
def test_a_quoted_value_is_read_back(value: str) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([f"resume={keep_going.quoted(value)}"])
    assert parsed.value() == value


def test_chunks() -> None:
    assert [list(part) for part in keep_going.chunks([1, 2, 3], 2)] == [[1, 2], [3]]
    assert [list(part) for part in keep_going.chunks([1, 2, 3], None)] == [[1, 2, 3]]
    assert list(keep_going.chunks([], None)) == []
