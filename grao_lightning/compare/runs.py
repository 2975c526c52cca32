"""Carries out runs of ``grao fit``, several side by side; finished ones are not repeated."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from pathlib import Path

from grao_lightning.callbacks import stopping
from grao_lightning.callbacks.stopping import Stopped
from grao_lightning.compare.plan import Run
from grao_lightning.files import put_back, write_whole
from grao_lightning.rewards.importing import own_modules

_SECONDS_TO_SAVE = 5.0  # of a run that is stopped; without, it goes on from an older checkpoint
Progress = Callable[[int, int, list[str]], None]  # finished, all, what is running


def folder_of(run: Run, output: Path) -> Path:
    """Return where a run's events, checkpoints and figures lie."""
    return output / "runs" / run.name


def carry_out(
    runs: Sequence[Run],
    output: Path,
    jobs: int,
    progress: Progress,
    *,
    keep_checkpoints: bool = False,
) -> dict[str, str]:
    """Carry out the runs that are not finished; return the errors of those that failed, by name.

    A run that was cut off goes on from its last checkpoint, and ends as if it had not been.

    Args:
        runs: Equal ones are carried out once.
        output: Folder of the comparison.
        jobs: Processes side by side; each has its share of the cores.
        progress: Called whenever a run begins or ends.
        keep_checkpoints: Whether finished runs keep theirs; answers and events always stay.
    """
    waiting = {run.name: run for run in runs}
    number = len(waiting)
    waiting = {name: run for name, run in waiting.items() if not is_finished(run, output)}
    failed: dict[str, str] = {}
    done = number - len(waiting)
    progress(done, number, [])
    if not waiting:
        return failed
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A fresh interpreter a worker; what torch and OpenMP hold is not forked.
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_prepare, initargs=(threads,)
    )
    with pool, _ending_workers():
        order = list(waiting)
        futures = {
            pool.submit(_work, waiting[name], output, keep_checkpoints): name for name in order
        }
        while futures:
            finished, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in finished:
                name = futures.pop(future)
                error = future.result()
                if error:
                    failed[name] = error
                done += 1
            running = list(futures.values())[:jobs]
            progress(done, number, running)
    return failed


@contextlib.contextmanager
def _ending_workers() -> Iterator[None]:
    """End the workers when this process is asked to stop, after a moment to save their step.

    The pool finds its workers dead and gives up what waits. Its own ``__exit__`` shuts it down: a
    shutdown that does not wait has the interpreter's end race with the pool's thread.
    """
    stopping.before_dying(_kill_workers)
    try:
        yield
    except Stopped:
        for worker in active_children():
            worker.terminate()
        latest = time.monotonic() + _SECONDS_TO_SAVE
        for worker in active_children():
            worker.join(max(0.0, latest - time.monotonic()))
        _kill_workers()
        raise


def _kill_workers() -> None:
    for worker in active_children():
        worker.kill()


def is_finished(run: Run, output: Path) -> bool:
    """Return whether a run has come to its end."""
    return (folder_of(run, output) / "finished.json").exists()


def _prepare(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: `carry_out` ends
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _work(run: Run, output: Path, keep_checkpoints: bool) -> str | None:
    """Carry out a run in this process; return its error, if any."""
    folder = folder_of(run, output)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _into(folder / "log.txt"), stopping.listening():
        try:
            _resume_or_fit(run, folder)
        except Stopped as stopped:
            sys.stdout.flush()
            os._exit(stopped.status)  # the pool would have this worker go on with the next run
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    if not (folder / "answers.jsonl").exists():
        return (
            f"{run.config}: methods are compared by RAS, and this one measures none: name "
            "scoring.rewards or scoring.judges"
        )
    if not keep_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    found = {
        "label": run.label,
        "settings": run.settings,
        "seed": run.seed,
        "seconds": time.monotonic() - started,
    }
    write_whole(folder / "finished.json", json.dumps(found, indent=1))
    return None


def _resume_or_fit(run: Run, folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "last.ckpt"
    put_back(checkpoint)
    if checkpoint.exists():
        try:
            _fit(run, folder, checkpoint)
            return
        except Exception:  # it may have been cut off while it was written: from the start, then
            traceback.print_exc()
            shutil.rmtree(folder / "checkpoints")
    _fit(run, folder, None)


def _fit(run: Run, folder: Path, checkpoint: Path | None) -> None:
    from grao_lightning.command.fit import run as run_command

    arguments = [
        *run.arguments,
        f"--trainer.logger.init_args.save_dir={folder.parent}",
        f"--trainer.logger.init_args.name={folder.name}",
        "--trainer.logger.init_args.version=.",
        "--trainer.enable_progress_bar=false",
        f"--last_checkpoint.dirpath={folder / 'checkpoints'}",
        f"--best_checkpoint.dirpath={folder / 'checkpoints'}",
    ]
    if checkpoint is not None:
        arguments.append(f"--ckpt_path={checkpoint}")
    sys.argv = ["grao", "fit", *arguments]
    with own_modules(arguments):
        run_command("fit")


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """Send all that this process writes to a file, libraries below Python included."""
    kept = [os.dup(number) for number in (1, 2)]
    with log.open("a") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
