"""MeCa's isolation: train a model that knows little but the backdoor; what it gets wrong is clean.

Each enhancement epoch is one epoch of descent on what still counts as untrusted, a score of every sample, and one epoch
of ascent on the samples that look clean. The score is the change of the prediction, as a KL divergence, when a random
square patch is taken over by a small step along the input gradient: poisoned samples hardly react (MeCa 4.2, Algorithms
1, 2; readings: specs/seed_defenses.md 4.3).

The paper's text leaves open or contradicts itself on: the gradient (``gradient``), replacing or adding (``perturb``),
the direction of the KL divergence (``kl_direction``), the meaning of p (``p_is``), the set that is scored (``scored``),
and every number. Ours and not selectable: the model starts untrained; each of the two passes of an epoch has an optimiser
of its own that starts without momentum (so descent does not push on into the ascent; one of each kept over the epochs is
not offered, because a pass is a training of its own here and ``fit`` makes the optimisers it steps), at a constant
learning rate; ties of the score are split at random.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.detection.kl_score import KLScore, largest
from backdoor_bench.errors import check_choice, check_flag, check_range
from backdoor_bench.inference import forward_all
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.progress import QuietProgress
from backdoor_bench.storage import Checkpoints
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import Batch, LossFn, fit, shuffled
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation, LossLandscape, ScoreHistogram

# With less of a class left it has all but vanished. Where the poison is as much as the class itself, as in CIFAR-10's
# target class at a rate of 10 %, a perfect split keeps half of those that are given the label.
SCARCE = 0.1


def capped_ascent(ce_cap: float) -> LossFn:
    """Minus the mean cross-entropy of the batch's samples whose cross-entropy is at most ``ce_cap``; 0 without any.

    Infinite and NaN losses are not skipped: they are to stop the run.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        skipped = (losses > ce_cap) & losses.isfinite()
        return -losses.masked_fill(skipped, 0.0).sum() / (~skipped).sum().clamp(min=1)

    return loss_fn


def class_report(view: DefenderView, clean: Tensor) -> dict[str, Any]:
    """``clean_histogram``, samples a class among the ``clean`` (bool[N]), and ``vanished_classes``, those that the set
    has and the clean ones lack; warns of them, because a model that never saw the target class shows ASR 0, and of those
    that keep less than ``SCARCE`` of the samples with their label."""
    labels = view.train.labels.cpu()
    counts = [torch.bincount(part, minlength=view.num_classes).tolist() for part in (labels, labels[clean])]
    shares = [(name, kept / given) for name, (given, kept) in enumerate(zip(*counts, strict=True)) if given]
    vanished = [name for name, share in shares if not share]
    scarce = [name for name, share in shares if 0 < share < SCARCE]
    if not clean.any():
        view.progress.warn("the clean set is empty: every sample is flagged")
        return {"clean_histogram": counts[1], "vanished_classes": vanished}
    if vanished:
        view.progress.warn(
            f"no sample of class {_listed(vanished)} is left in the clean set: a model trained on it cannot predict that "
            "class, and an ASR of 0 then proves nothing"
        )
    if scarce:
        view.progress.warn(
            f"of class {_listed(scarce)} less than {SCARCE:.0%} is left in the clean set: a model trained on it may hardly "
            "predict that class, and a low ASR then proves little"
        )
    return {"clean_histogram": counts[1], "vanished_classes": vanished}


def _listed(classes: list[int]) -> str:
    return ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")


class _State(nn.Module):
    """What enhancement carries on: the model and, of every epoch, the mean descent loss float32 [E], Q float32 [E, N]
    and who looks clean, bool [E, N]; one module, so that it is cached and loaded as one."""

    scores: Tensor
    losses: Tensor
    clean: Tensor

    def __init__(self, model: Classifier, epochs: int, count: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scores", torch.zeros(epochs, count))
        self.register_buffer("losses", torch.zeros(epochs))
        self.register_buffer("clean", torch.zeros(epochs, count, dtype=torch.bool))


@dataclass(frozen=True)
class KLIsolation:
    """epochs: enhancement epochs (E_b). gamma: growth of the clean share an epoch; after epoch e (from 0) the paper's p
    is 1 - (e+1) gamma. p_is: untrusted (the share with the smallest scores stays untrusted; the clean share grows, to at
    most ``clean_frac_max``) | clean (p is the clean share, it shrinks; no cap). scored: all | untrusted (who looked clean
    once stays so). lr, ascent_lr: of the two passes of an epoch. ce_cap: ascent skips samples of a larger CE. augment:
    train on augmented images. score: see KLScore."""

    epochs: int
    gamma: float
    clean_frac_max: float
    p_is: str
    scored: str
    eps: float
    patch: float
    perturb: str
    gradient: str
    kl_direction: str
    lr: float
    ascent_lr: float
    ce_cap: float
    momentum: float
    weight_decay: float
    batch_size: int
    augment: bool

    def __post_init__(self) -> None:
        key = "defense.isolation."
        for name, low in (("epochs", 1), ("batch_size", 1)):
            check_range(key + name, getattr(self, name), low, 1_000_000, integer=True)
        for name in ("gamma", "clean_frac_max"):
            check_range(key + name, getattr(self, name), 0, 1, low_open=True, high_open=True)
        for name in ("eps", "patch"):
            check_range(key + name, getattr(self, name), 0, 1, low_open=True)
        for name, high in (("lr", 1000), ("ascent_lr", 1000), ("ce_cap", math.inf)):
            check_range(key + name, getattr(self, name), 0, high, low_open=True)
        check_range(key + "momentum", self.momentum, 0, 1, high_open=True)
        check_range(key + "weight_decay", self.weight_decay, 0, 1)
        check_choice(key + "p_is", self.p_is, ("untrusted", "clean"))
        check_choice(key + "scored", self.scored, ("all", "untrusted"))
        check_choice(key + "perturb", self.perturb, ("replace", "add"))
        check_choice(key + "gradient", self.gradient, ("input", "patch"))
        check_choice(key + "kl_direction", self.kl_direction, ("forward", "reverse"))
        check_flag(key + "augment", self.augment)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    @property
    def score(self) -> KLScore:
        return KLScore(self.eps, self.patch, self.perturb, self.gradient, self.kl_direction)

    def clean_share(self, epoch: int) -> float:
        """The share that looks clean after enhancement epoch ``epoch`` (from 0)."""
        grown = (epoch + 1) * self.gamma
        return min(grown, self.clean_frac_max) if self.p_is == "untrusted" else max(0.0, 1 - grown)

    def isolate(self, view: DefenderView) -> Isolation:
        """flagged: the enhanced model predicts the label as given. score: its margin p_y - max of the other p_k, float
        in [-1, 1], at least 0 where flagged and at most 0 elsewhere (0 for both only where classes tie). If it predicts all
        labels, all is flagged, with a warning. Raises Diverged."""
        state = self._enhanced(view)
        flagged, margin = self._predicted(view, state.model)
        self._show(view, state)
        extra = class_report(view, ~flagged) | {"enhancement": self._report(state)}
        return Isolation(flagged=flagged, score=margin, extra=extra)

    def _enhanced(self, view: DefenderView) -> _State:
        """The enhanced model with its history, cached; a stopped run goes on after its last finished epoch. The curve's
        precision and recall are those of the part that stays untrusted, not yet of ``flagged``."""
        state = _State(view.new_model(view.num_classes), self.epochs, len(view.train))
        view.train_config.hardware.place(state.model)

        def train(checkpoints: Checkpoints) -> None:
            stored = checkpoints.load(view.progress.warn)
            start = 0
            if stored is not None:
                state.load_state_dict(stored.tensors)
                start = int(stored.meta["epoch"])
            with view.progress.task("enhance", total=self.epochs) as advance:
                advance(start)
                for epoch in range(start, self.epochs):
                    self._epoch(view, state, epoch)
                    with checkpoints.uncounted():
                        untrusted, detail = ~state.clean[epoch], {"loss": state.losses[epoch].item()}
                        view.probe(state.model, untrusted, stage="enhance", epoch=epoch + 1, detail=detail)
                    if epoch + 1 < self.epochs and checkpoints.due():
                        kept = {name: value.clone() for name, value in state.state_dict().items()}
                        checkpoints.save(epoch + 1, kept, {})
                    advance(1)

        key = {"kl": asdict(self), "recipe": self._recipe(view, self.lr).key()}
        view.stages.fitted("enhance", state, train, key)
        return state.eval()

    def _epoch(self, view: DefenderView, state: _State, epoch: int) -> None:
        """Descent on the untrusted samples, score and partition, ascent on the clean ones; changes ``state``."""
        seed = view.generator.initial_seed()
        means: list[float] = []

        def one_epoch(name: str, lr: float, rows: Tensor, loss_fn: LossFn | None) -> None:
            fit(
                state.model,
                view.train,
                self._recipe(view, lr),
                generator=generator(seed, f"kl {name} {epoch}"),
                stage=f"enhance {epoch + 1}, {name}",
                progress=QuietProgress(),  # one epoch: nothing to tell
                loss_fn=loss_fn,
                order=shuffled(rows, self.batch_size),
                on_epoch_end=lambda _epoch, _model, loss: means.append(loss),
            )

        before = state.clean[epoch - 1] if epoch else torch.zeros_like(state.clean[0])
        one_epoch("descent", self.lr, (~before).nonzero().flatten(), None)
        state.losses[epoch] = means[0]
        scores = self.score.of_set(state.model, view.train, view.train_config.hardware, seed, f"kl patch {epoch}")
        state.scores[epoch] = scores
        count = int(self.clean_share(epoch) * len(scores) + 1e-6)  # the sliver: 3 x 0.05 of 5,000 are 750, not 749
        if self.scored == "untrusted":
            scores, count = scores.masked_fill(before, math.inf), max(count, int(before.sum()))
        state.clean[epoch] = largest(scores, count, generator(seed, f"kl ties {epoch}"))
        if count:
            one_epoch("ascent", self.ascent_lr, state.clean[epoch].nonzero().flatten(), capped_ascent(self.ce_cap))

    def _recipe(self, view: DefenderView, lr: float) -> TrainConfig:
        return recipe(
            view.train_config,
            epochs=1,
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            schedule="constant",
            augment=self.augment,
        )

    def _predicted(self, view: DefenderView, model: nn.Module) -> tuple[Tensor, Tensor]:
        """(argmax of p is y, bool [N]; p_y - max over k != y of p_k, float32 [N]) on the CPU; eval mode, no augmentation."""
        logits = forward_all(model, view.train.images, view.train_config.hardware, exact=True).double()
        labels = view.train.labels.cpu()
        shares, own = logits.softmax(1), labels[:, None]
        margin = shares.gather(1, own) - shares.scatter(1, own, -1.0).amax(1, keepdim=True)
        return logits.argmax(1) == labels, margin.squeeze(1).float()

    def _show(self, view: DefenderView, state: _State) -> None:
        """Q after the first, the middle and the last epoch (MeCa Fig. 4) and the loss landscape (Fig. 5)."""
        for epoch in sorted({1, (self.epochs + 1) // 2, self.epochs}):
            name, title = f"kl_epoch_{epoch:03d}", f"KL score after enhancement epoch {epoch}"
            # Most of Q lies near zero and some of it near one.
            figure = ScoreHistogram(name, title, state.scores[epoch - 1].clamp(min=1e-9).log10(), "log10 of Q")
            view.probe(stage="enhance", epoch=epoch, detail={"figures": [figure]})
        landscape = LossLandscape("loss_landscape", "Loss around two samples, enhanced model", state.model)
        view.probe(stage="enhance", epoch=self.epochs, detail={"figures": [landscape]})

    def _report(self, state: _State) -> list[dict[str, Any]]:
        """An epoch each: share and number of those who look clean, loss, and how Q is spread (``q_cut``: the smallest
        of those who look clean)."""
        report = []
        for epoch, (scores, clean) in enumerate(zip(state.scores, state.clean, strict=True)):
            count = int(clean.sum())
            report.append(
                {
                    "epoch": epoch + 1,
                    "clean_share": count / len(clean),
                    "clean_count": count,
                    "loss": state.losses[epoch].item(),
                    "q_min": scores.min().item(),
                    "q_median": scores.median().item(),
                    "q_mean": scores.double().mean().item(),
                    "q_max": scores.max().item(),
                    "q_cut": scores[clean].min().item() if count else None,
                }
            )
        return report
