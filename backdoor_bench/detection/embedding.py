"""Features [N, d] -> points [N, 2] by t-SNE, PCA or SVD, behind one function, whichever library is there.

Every setting is handed to the library explicitly: the extent of a t-SNE map differs 1.5-2x between the defaults of the
libraries, and DBSCAN's eps is a length in the map.

A library that is missing, fails or returns NaN is followed by the next one of cuml | tsnecuda | torchdr -> opentsne ->
sklearn -> pca; PCA of finite features is always finite.

openTSNE is given its neighbours by one exact search: for 5,000 x 128 features at perplexity 50 that takes 0.3 s where
its approximate one takes 2 s (two threads).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backdoor_bench.errors import BenchError, ConfigError, Diverged, check_choice, check_range

Array = NDArray[np.float64]

BACKENDS = ("auto", "opentsne", "sklearn", "cuml", "tsnecuda", "torchdr", "pca", "svd")
FALLBACKS = ("opentsne", "sklearn", "pca")
FEWEST = 5  # fewer samples have no neighbourhoods to embed
EXACT_UP_TO = 60_000  # samples; on two cores exact search takes 14 s at 50,000 x 128, where Annoy takes 25 s
INITIAL_STD = 1e-4  # of the first coordinate, as in every t-SNE
LONGEST_STEP = 5.0  # a point moves at most this far an iteration (openTSNE's max_step_norm)
BARNES_HUT_ANGLE = 0.5
FFT_FROM = 10_000  # samples; below, two threads of Barnes-Hut are faster (5,000: 7 s against 11 s)


@dataclass(frozen=True)
class EmbeddingSettings:
    """backend: auto|opentsne|sklearn|cuml|tsnecuda|torchdr|pca|svd; auto = cuml on a GPU if installed, else opentsne.
    perplexity: lowered where 3 * perplexity exceeds N - 1. learning_rate: a number, or ``auto`` = N over the
    exaggeration in force (Belkina et al., 2019). early_exaggeration, exaggeration_iter: factor and length of the first
    phase. iterations: those after it. early_momentum, momentum: of the two phases. neighbors: exact|approx|auto.
    repulsion: auto|fft|bh (Barnes-Hut), openTSNE's; auto = bh below 10,000. initialisation: pca|random.
    pca_dims: principal components kept before t-SNE, 0 = off. rescale_radius: in pca and svd maps, the 95th percentile
    of the distance to the centroid.
    """

    backend: str
    perplexity: float
    learning_rate: float | str
    early_exaggeration: float
    exaggeration_iter: int
    iterations: int
    early_momentum: float
    momentum: float
    neighbors: str
    repulsion: str
    initialisation: str
    pca_dims: int
    rescale_radius: float

    def __post_init__(self) -> None:
        key = "defense.isolation.embedding."
        check_choice(key + "backend", self.backend, BACKENDS)
        check_range(key + "perplexity", self.perplexity, 1, 10_000)
        if self.learning_rate != "auto":
            if isinstance(self.learning_rate, str):
                raise ConfigError(f"{key}learning_rate={self.learning_rate!r} is not allowed: a number > 0, or auto")
            check_range(key + "learning_rate", self.learning_rate, 0, float("inf"), low_open=True)
        check_range(key + "early_exaggeration", self.early_exaggeration, 1, 1000)
        check_range(key + "exaggeration_iter", self.exaggeration_iter, 0, 100_000, integer=True)
        check_range(key + "iterations", self.iterations, 1, 100_000, integer=True)
        check_range(key + "early_momentum", self.early_momentum, 0, 1, high_open=True)
        check_range(key + "momentum", self.momentum, 0, 1, high_open=True)
        check_choice(key + "neighbors", self.neighbors, ("exact", "approx", "auto"))
        check_choice(key + "repulsion", self.repulsion, ("auto", "fft", "bh"))
        check_choice(key + "initialisation", self.initialisation, ("pca", "random"))
        check_range(key + "pca_dims", self.pca_dims, 0, 100_000, integer=True)
        check_range(key + "rescale_radius", self.rescale_radius, 0, float("inf"), low_open=True)


@dataclass(frozen=True)
class Embedding:
    """points: float32 [N, 2] on the CPU, finite. backend, version: what made them. settings: as used (a lowered
    perplexity, the learning rates). extent: the longer side of the bounding box. notes: what differed from the request.
    """

    points: Tensor
    backend: str
    version: str
    settings: dict[str, Any]
    extent: float
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    """What a backend gets. features: float32 [N, d] on the CPU. note: adds a remark to the result."""

    features: Tensor
    settings: EmbeddingSettings
    seed: int
    threads: int
    device: torch.device
    note: Callable[[str], None]

    @property
    def neighbours(self) -> int:
        """3 x perplexity, the usual reach of t-SNE's Gaussians."""
        return min(len(self.features) - 1, int(3 * self.settings.perplexity + 1e-6))

    @property
    def total_iterations(self) -> int:
        return self.settings.exaggeration_iter + self.settings.iterations

    def rate(self, auto: float) -> float:
        """The learning rate: the one set, or ``auto``."""
        return auto if isinstance(self.settings.learning_rate, str) else float(self.settings.learning_rate)


@dataclass(frozen=True)
class _Made:
    """What a backend returns: points [N, 2], its version, settings beyond those asked for."""

    points: NDArray[Any]
    version: str
    used: dict[str, Any]


def embed(
    features: Tensor,
    settings: EmbeddingSettings,
    seed: int,
    threads: int,
    device: torch.device,
    warn: Callable[[str], None] = lambda message: None,
) -> Embedding:
    """A map of the features in the plane.

    features: float [N, d]. seed: opentsne, sklearn, pca and svd give the same points for the same seed and number of
    threads; the GPU libraries need not. device: where cuml, tsnecuda, torchdr and the neighbour search compute.
    warn: told of each fallback and of a lowered perplexity; the same texts are the result's ``notes``.
    Raises Diverged if features are NaN or infinite (the training went wrong, not the map).
    """
    start = time.perf_counter()
    features = features.detach().float().cpu()
    broken = int((~torch.isfinite(features).all(1)).sum())
    if broken:
        raise Diverged(
            f"the features of {broken} of {len(features)} samples are NaN or infinite, so they have no map: "
            "the training has diverged; lower train.lr, or detect in other epochs"
        )
    notes: list[str] = []

    def note(message: str) -> None:
        notes.append(message)
        warn(message)

    settings, chain = _plan(features, settings, device, note)
    task = _Task(_reduced(features, settings, chain[0]), settings, seed, threads, device, note)
    for index, backend in enumerate(chain):
        try:
            made = _MAKERS[backend](task)
            points = torch.from_numpy(np.array(made.points, dtype=np.float32)).reshape(len(features), 2)
            if not torch.isfinite(points).all():
                raise ArithmeticError("the map contains NaN or infinite points")
            break
        except BenchError:
            raise
        except Exception as error:
            # A foreign library may fail in any way; the last backend has nothing to fall to.
            if index == len(chain) - 1:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            note(f"embedding backend {backend} failed ({type(error).__name__}: {reason}); using {chain[index + 1]}")
    extent = float((points.amax(0) - points.amin(0)).max()) if len(points) else 0.0
    return Embedding(
        points=points,
        backend=backend,
        version=made.version,
        settings={**asdict(settings), **made.used, "backend": backend, "seed": seed, "threads": threads},
        extent=extent,
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def resolved_backend(backend: str, device: torch.device) -> str:
    """What ``auto`` means here: cuml on a GPU where it is installed, else opentsne."""
    if backend != "auto":
        return backend
    return "cuml" if device.type == "cuda" and importlib.util.find_spec("cuml") is not None else "opentsne"


def _plan(
    features: Tensor, settings: EmbeddingSettings, device: torch.device, note: Callable[[str], None]
) -> tuple[EmbeddingSettings, tuple[str, ...]]:
    """Settings that this many samples allow, and the backends to try in turn."""
    backend = resolved_backend(settings.backend, device)
    if settings.backend == "auto" and device.type == "cuda" and backend != "cuml":
        note("cuml is not installed: t-SNE runs on the CPU (install the extra 'gpu' to run it on the GPU)")
    if backend in ("pca", "svd"):
        return settings, (backend,)
    count = len(features)
    if count < FEWEST:
        note(f"{count} samples are too few for t-SNE (at least {FEWEST}); using pca")
        return settings, ("pca",)
    if bool((features == features[0]).all()):
        note("all features are equal: there is nothing to map; using pca, which puts all points in one place")
        return settings, ("pca",)
    if 3 * settings.perplexity > count - 1:
        lowered = (count - 1) / 3
        note(f"perplexity {settings.perplexity:g} lowered to {lowered:.4g}, a third of the {count - 1} other samples")
        settings = replace(settings, perplexity=lowered)
    chain = FALLBACKS[FALLBACKS.index(backend) :] if backend in FALLBACKS else (backend, *FALLBACKS)
    return settings, chain


def _reduced(features: Tensor, settings: EmbeddingSettings, backend: str) -> Tensor:
    """The first ``pca_dims`` principal components where that is fewer than the features, else the features."""
    if backend in ("pca", "svd") or not 0 < settings.pca_dims < features.shape[1]:
        return features
    return _projected(features, settings.pca_dims, centre=True)


def _projected(features: Tensor, dims: int, centre: bool) -> Tensor:
    """float32 [N, dims]: projection on the leading right singular vectors of the (centred) features.

    By the eigenvectors of the d x d second moments, so no randomness; each vector's largest entry is made positive,
    since its sign is arbitrary. Missing dimensions (d < dims) are zero.
    """
    if centre and len(features):
        features = features - features.mean(0)
    width = features.shape[1]
    moments = torch.zeros(width, width, dtype=torch.float64)
    for chunk in features.split(8192):
        moments += (chunk.T @ chunk).double()
    vectors = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :dims]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    points = features @ (vectors * torch.where(largest < 0, -1.0, 1.0)).float()
    return torch.nn.functional.pad(points, (0, dims - points.shape[1]))


def _initial(task: _Task) -> Array:
    """Start of the optimisation, [N, 2]: the two leading principal components or a Gaussian, both of deviation 1e-4."""
    generator = np.random.default_rng(task.seed)
    noise = generator.normal(0.0, INITIAL_STD, (len(task.features), 2))
    if task.settings.initialisation == "random":
        return noise
    points = _projected(task.features, 2, centre=True).double().numpy()
    # A little jitter, because equal samples must not stay on top of each other.
    return points * (INITIAL_STD / points[:, 0].std()) + 0.01 * noise


def nearest_neighbours(features: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(indices int64 [N, count], Euclidean distances float32 [N, count]) of the nearest others, nearest first; exact.

    features: float32 [N, d] on the CPU. Memory: blocks of rows, at most 256 MiB each.
    """
    # Distances by |a|^2 - 2ab + |b|^2 lose digits where the features lie far from the origin.
    features = (features - features.mean(0)).to(device)
    total = len(features)
    squares = features.square().sum(1)
    rows = max(1, 2**26 // total)
    indices, distances = [], []
    for start in range(0, total, rows):
        block = features[start : start + rows]
        if device.type == "cuda":
            # Matrix products may be set to TF32, too coarse for a difference of squares.
            squared = torch.cdist(block, features, compute_mode="donot_use_mm_for_euclid_dist").square_()
        else:
            squared = torch.addmm(squares, block, features.T, alpha=-2).add_(squares[start : start + rows, None])
        squared.diagonal(offset=start).fill_(float("inf"))
        values, nearest = squared.topk(count, largest=False)
        indices.append(nearest.cpu())
        distances.append(values.clamp_(min=0).sqrt_().cpu())
    return torch.cat(indices), torch.cat(distances)


def _make_opentsne(task: _Task) -> _Made:
    import openTSNE
    from openTSNE import affinity, nearest_neighbors

    settings, count = task.settings, len(task.features)
    search = settings.neighbors
    if search == "auto":
        search = "exact" if count <= EXACT_UP_TO or task.device.type == "cuda" else "approx"
    if search == "exact":
        indices, distances = nearest_neighbours(task.features, task.neighbours, task.device)
        found = nearest_neighbors.PrecomputedNeighbors(indices.numpy(), distances.numpy())
    else:
        found = nearest_neighbors.Annoy(
            task.features.numpy(), task.neighbours, metric="euclidean", n_jobs=task.threads, random_state=task.seed,
            knn_kwargs={"n_trees": 50},
        )  # fmt: skip
    affinities = affinity.PerplexityBasedNN(
        perplexity=settings.perplexity, knn_index=found, symmetrize=True, n_jobs=task.threads
    )
    repulsion = settings.repulsion
    if repulsion == "auto":
        repulsion = "bh" if count < FFT_FROM else "fft"
    embedding = openTSNE.TSNEEmbedding(
        _initial(task), affinities, random_state=task.seed, negative_gradient_method=repulsion, dof=1,
        theta=BARNES_HUT_ANGLE, n_interpolation_points=3, min_num_intervals=50, ints_in_interval=1, max_grad_norm=None,
        max_step_norm=LONGEST_STEP, n_jobs=task.threads, verbose=False,
    )  # fmt: skip
    rates = task.rate(count / settings.early_exaggeration), task.rate(count)
    for iterations, exaggeration, momentum, rate in (
        (settings.exaggeration_iter, settings.early_exaggeration, settings.early_momentum, rates[0]),
        (settings.iterations, 1, settings.momentum, rates[1]),
    ):
        if iterations:
            embedding = embedding.optimize(
                n_iter=iterations, exaggeration=exaggeration, momentum=momentum, learning_rate=rate, inplace=True
            )
    # Rounded, because the threads add up the divergence in any order; the points do not depend on it.
    used = {
        "neighbors": search,
        "repulsion": repulsion,
        "learning_rates": rates,
        "kl_divergence": round(float(embedding.kl_divergence), 6),
    }
    return _Made(np.asarray(embedding), openTSNE.__version__, used)


def _make_sklearn(task: _Task) -> _Made:
    import sklearn
    from sklearn.manifold import TSNE

    settings = task.settings
    task.note("sklearn: exaggeration lasts 250 iterations whatever exaggeration_iter, momentum is 0.5, then 0.8")
    # Its gradient carries the factor 4 that the others leave out, and one rate serves both phases.
    rate = task.rate(len(task.features) / settings.early_exaggeration) / 4
    total = 250 + settings.iterations
    points = TSNE(
        n_components=2, perplexity=settings.perplexity, early_exaggeration=settings.early_exaggeration,
        learning_rate=rate, max_iter=total, n_iter_without_progress=total, min_grad_norm=0.0, metric="euclidean",
        init=_initial(task).astype(np.float32), random_state=task.seed, method="barnes_hut", angle=BARNES_HUT_ANGLE,
        n_jobs=task.threads,
    ).fit_transform(task.features.numpy())  # fmt: skip
    return _Made(points, sklearn.__version__, {"learning_rates": (rate, rate)})


def _accepted(function: Callable[..., Any], wanted: dict[str, Any], task: _Task) -> dict[str, Any]:
    """Of ``wanted`` what this version of ``function`` takes; the rest is noted. ``a|b``: the first name that it has."""
    parameters = inspect.signature(function).parameters
    arguments = {}
    for names, value in wanted.items():
        name = next((name for name in names.split("|") if name in parameters), None)
        if name is None:
            task.note(f"{function.__module__} takes no {names.split('|')[0]}: it is left to the library")
        else:
            arguments[name] = value
    return arguments


def _make_cuml(task: _Task) -> _Made:
    import cuml
    from cuml.manifold import TSNE

    settings = task.settings
    # Without its "adaptive" mode, which would replace perplexity, neighbours and exaggeration by its own, cuML doubles
    # the rate after the exaggeration: N/6 and N/3, of which N/3 is the rate of that mode.
    rate = task.rate(len(task.features) / 6)
    wanted = {
        "n_components": 2, "perplexity": settings.perplexity, "n_neighbors": min(task.neighbours, 1023),
        "early_exaggeration": settings.early_exaggeration, "late_exaggeration": 1.0,
        "exaggeration_iter": settings.exaggeration_iter, "max_iter|n_iter": task.total_iterations,
        "learning_rate": rate, "learning_rate_method": "none", "pre_momentum": settings.early_momentum,
        "post_momentum": settings.momentum, "min_grad_norm": 1e-7, "metric": "euclidean", "method": "fft",
        "init": settings.initialisation, "random_state": task.seed, "output_type": "numpy",
    }  # fmt: skip
    arguments = _accepted(TSNE, wanted, task)
    with _current(task.device):
        points = TSNE(**arguments).fit_transform(task.features.numpy())
    return _Made(np.asarray(points), cuml.__version__, {"learning_rates": (rate, 2 * rate)})


def _make_tsnecuda(task: _Task) -> _Made:
    import tsnecuda

    settings = task.settings
    rate = task.rate(len(task.features) / settings.early_exaggeration)
    wanted = {
        "n_components": 2, "perplexity": settings.perplexity, "num_neighbors": min(task.neighbours, 1023),
        "early_exaggeration": settings.early_exaggeration, "force_magnify_iters": settings.exaggeration_iter,
        "n_iter": task.total_iterations, "n_iter_without_progress": task.total_iterations, "min_grad_norm": 0.0,
        "learning_rate": rate, "pre_momentum": settings.early_momentum, "post_momentum": settings.momentum,
        "metric": "euclidean", "theta": BARNES_HUT_ANGLE, "init": "random", "random_seed": task.seed,
        "device": task.device.index or 0,
    }  # fmt: skip
    arguments = _accepted(tsnecuda.TSNE, wanted, task)
    # It ignores its seed; the start can be given instead.
    start = np.asfortranarray(_initial(task), dtype=np.float32)
    points = tsnecuda.TSNE(**arguments).fit_transform(task.features.numpy(), start)
    return _Made(points, getattr(tsnecuda, "__version__", "unknown"), {"learning_rates": (rate, rate)})


def _make_torchdr(task: _Task) -> _Made:
    import torchdr

    settings = task.settings
    # "auto" is its own rule, N over four times the exaggeration in force: the rate of the others, for a gradient with
    # the factor 4. Momentum is 0.5, then 0.8.
    rate: float | str = "auto" if settings.learning_rate == "auto" else task.rate(0) / 4
    wanted = {
        "perplexity": settings.perplexity, "n_components": 2, "lr": rate, "optimizer": "SGD",
        "optimizer_kwargs": "auto", "init": "pca" if settings.initialisation == "pca" else "normal",
        "init_scaling": INITIAL_STD, "min_grad_norm|tol": 0.0, "max_iter": task.total_iterations,
        "device": str(task.device), "random_state": task.seed,
        "early_exaggeration_coeff|early_exaggeration": settings.early_exaggeration,
        "early_exaggeration_iter": settings.exaggeration_iter, "metric|metric_in": "sqeuclidean", "verbose": False,
    }  # fmt: skip
    arguments = _accepted(torchdr.TSNE, wanted, task)
    points = torchdr.TSNE(**arguments).fit_transform(task.features.to(task.device))
    return _Made(torch.as_tensor(points).cpu().numpy(), torchdr.__version__, {"learning_rates": (rate, rate)})


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device the current one, for libraries that take no device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _make_linear(task: _Task, centre: bool) -> _Made:
    """The two leading components, scaled to the size of a t-SNE map, since eps is a length in such a map."""
    points = _projected(task.features, 2, centre).double()
    if len(points):
        distance = (points - points.mean(0)).norm(dim=1)
        radius = float(torch.quantile(distance, 0.95)) if len(points) <= 2**24 else float(distance.max())
        # Where 95 % of the samples are equal the radius is 0; the farthest one then gives the scale.
        radius = radius or float(distance.max())
        if radius > 0:
            points = points * (task.settings.rescale_radius / radius)
    return _Made(points.numpy(), torch.__version__, {})


_MAKERS: dict[str, Callable[[_Task], _Made]] = {
    "opentsne": _make_opentsne,
    "sklearn": _make_sklearn,
    "cuml": _make_cuml,
    "tsnecuda": _make_tsnecuda,
    "torchdr": _make_torchdr,
    "pca": lambda task: _make_linear(task, centre=True),
    "svd": lambda task: _make_linear(task, centre=False),
}
