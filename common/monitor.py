"""What happens between updates: progress is shown, checkpoints are saved, a run is stopped."""

import signal
import time

import torch

from common import progress as progress_bar
from common import run
from common.build import Job
from common.errors import InputError
from common.run import Progress

PATIENCE = 20  # updates in a row without a finite loss, after which a run gives up
FAR = 2  # times the loss of guessing, which no run that learns has after an epoch
LOOK = 5  # seconds between comparisons of notes, about; at most 100 updates


class Monitor:
    """Shows progress, saves checkpoints within an epoch, and stops a run.

    SIGTERM, Ctrl-C, or a loss that stays infinite or NaN in any process stops all processes at the
    same update.
    """

    def __init__(self, job: Job, progress: Progress):
        self.job, self.progress, self.signal = job, progress, 0
        self.patience = min(PATIENCE, job.batches.updates)
        self.interval, self.noted, self.start = 1, 0, time.monotonic()
        # Updates in a row without a finite loss: here, and in any process at the last comparison.
        self.bad, self.known_bad = torch.zeros((), device=job.accelerator.device), 0.0

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.handlers = {number: signal.signal(number, self._stop) for number in numbers}
        total = self.job.args.epochs * self.job.batches.updates
        hidden = not self.job.accelerator.is_main_process
        options = {"unit": "update", "initial": self.progress.updates, "disable": hidden}
        self.bar, self.shown = progress_bar.bar(self._title(), total=total, **options), {}
        self.epoch_start = time.monotonic() - self.progress.seconds
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error is None:  # or a signal during the last evaluation would be lost
            accelerator = self.job.accelerator
            signals = torch.tensor([self.signal], device=accelerator.device)
            self.stop_by(accelerator.gather(signals).max().item())

    def _stop(self, number, _):
        self.signal = number
        if number == signal.SIGINT:  # a second one ends the program at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _title(self):
        best = f", best {self.progress.best:.1%}" if self.progress.best >= 0 else ""
        return f"epoch {self.progress.epoch + 1}/{self.job.args.epochs}{best}"

    def after_update(self, loss: torch.Tensor) -> None:
        """Take note of an update's loss in this process; save, and stop the program, if it is time.

        Raises:
            InputError: the loss has not been finite for ``patience`` updates.
            SystemExit: the run was asked to stop.
        """
        self.bad = torch.where(loss.isfinite(), 0.0, self.bad + 1)
        self.noted += 1
        self.bar.update()
        progress, every = self.progress, self.job.args.checkpoint_interval
        last = progress.epoch_updates == self.job.batches.updates
        due = every is not None and progress.updates % every == 0
        if self.noted < self.interval and not due and not last:
            return
        mean, number = self.compare(loss)
        self.show(mean)
        if number or (due and not last):
            run.save_checkpoint(self.job, progress)
        self.stop_by(number)

    def stop_by(self, number: int) -> None:
        """Stop the program, if ``number`` is a signal's and not 0.

        Raises:
            SystemExit: it is.
        """
        if number:
            self.bar.close()
            run.finish_trackers(self.job.accelerator)
            name, updates = signal.Signals(number).name, self.progress.updates
            stopped = f"stopped by {name} after update {updates}"
            self.job.accelerator.print(f"{stopped}; go on with --resume auto")
            raise SystemExit(0 if number == signal.SIGTERM else 128 + number)

    def compare(self, loss: torch.Tensor) -> tuple[float, int]:
        """Compare notes with the other processes.

        Returns:
            The mean loss, and the signal to stop by, 0 if none.

        Raises:
            InputError: the loss has not been finite for ``patience`` updates.
        """
        seconds = (time.monotonic() - self.start) / self.noted
        note = torch.tensor([self.signal, seconds], device=loss.device)
        note = torch.cat([note, torch.stack([loss.float(), self.bad])])
        notes = self.job.accelerator.gather(note[None])
        number, seconds, _, self.known_bad = notes.max(0).values.tolist()
        self.interval = min(max(1, int(LOOK / seconds)), 100)
        self.noted, self.start = 0, time.monotonic()
        if self.known_bad >= self.patience:
            first = self.progress.updates - self.known_bad + 1
            lately = f"the loss has not been finite since update {first:.0f}"
            raise InputError(f"{lately}: {run.REMEDY}")
        return notes[:, 2].mean().item(), int(number)

    def show(self, loss: float) -> None:
        """Bring this epoch's sums up to date, and show them; a tracker gets the last ``loss``."""
        job, progress = self.job, self.progress
        sums = job.accelerator.reduce(torch.stack([job.loss_sum, job.right]), "mean").tolist()
        progress.loss, progress.right = sums[0], sums[1] * job.accelerator.num_processes
        progress.seconds = time.monotonic() - self.epoch_start
        rates, updates = job.rates(), progress.epoch_updates
        self.shown = {"loss": f"{progress.loss / updates:.3f}"}  # over the epoch
        self.shown |= {key: f"{value:.4g}" for key, value in rates.items()}
        self.shown["images/s"] = f"{updates * job.args.batch_size / progress.seconds:.3g}"
        self.bar.set_postfix(self.shown, refresh=False)
        logged = {f"train/{key}": value for key, value in {"loss": loss, **rates}.items()}
        job.accelerator.log(logged, progress.updates)

    def warn_of_ruin(self) -> None:
        """Say if the first epoch's loss is far above that of a model that knows nothing."""
        job, loss = self.job, self.progress.loss / self.job.batches.updates
        nothing = torch.zeros(1, len(job.batches.label_names))  # logits, of all classes alike
        guessing = job.criterion(nothing, torch.zeros(1, dtype=torch.long)).item()
        if loss > FAR * guessing:
            rates = " or ".join(f"{key} {getattr(job.args, key)}" for key in job.rates())
            job.accelerator.print(
                f"warning: the loss of the first epoch is {loss:.4g}, and guessing has "
                f"{guessing:.4g}: {rates} may be too high"
            )

    def end_epoch(self, top1: float | None, ema_top1: float | None) -> None:
        """Log an epoch, with its top-1 on the held-out split if there is any; begin the next.

        ``ema_top1`` is that of the averaged weights.
        """
        run.log_epoch(self.job, self.progress, top1, ema_top1)
        if self.progress.epoch == 0:
            self.warn_of_ruin()
        if top1 is not None:
            self.progress.best = max(self.progress.best, top1)
            accuracy = {self.job.batches.held_out: f"{top1:.2%}"}
            accuracy |= {} if ema_top1 is None else {"ema": f"{ema_top1:.2%}"}
            self.bar.set_postfix(self.shown | accuracy, refresh=False)
        self.bar.refresh()
        self.progress.next_epoch()
        self.bar.set_description(self._title())
        self.epoch_start = time.monotonic()
