"""What trials teach about an estimate: a Gaussian process on log(measured / predicted).

Notation
    r     log of the measured loss over the predicted one                              (n,)
    F     linear features of points, each scaled by the deviation of its weight        (n, q)
    P     a few physical ones: kept fractions and rounding errors by third of the depth  (n, d)
    w     weights of F, standard normal before any trial                               (q,)

If every option's loss is off by a factor exp(e), the log of a sum is off by the e weighted with shares of the sum. So
shares are what the linear part sees: of variables and their options, of the same by kind and by third of the depth. A
constant, the log of the prediction and the log of the size are beside them, which learns offset and slope of the
estimate. A Matern-5/2 kernel on P takes what is not linear. The weights in turn are a better estimate (`factors`).
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np

from qpruner.decide.estimate import Estimate
from qpruner.decide.space import Point
from qpruner.errors import MissingExtraError

FIT_ITERATIONS = 25
FITTED = 150  # trials that the scales are fitted on, at most: the latest
CONSTANT, SLOPE, SIZE = 1.5, 0.4, 0.3  # deviations of offset, of slope in the log prediction and in the log size
MOST = 1.5  # log of the largest factor that an estimate is corrected by
TRUST = 0.15  # deviation of the log factors by which options' losses are off, before anything is learned of it
SURE = 1.01e-3  # a relative standard error below this is taken as this


class Features:
    """Linear and physical features of the points of a space."""

    def __init__(self, estimate: Estimate):
        self.estimate = estimate
        space = estimate.space
        last = max(1, len(space.layer_names) - 1)
        third = [min(2, 3 * v.layer // (last + 1)) if v.layer >= 0 else 3 for v in space.variables]
        what = []
        for v in space.variables:
            name = v.name.removeprefix(space.layer_names[v.layer]) if v.layer >= 0 else v.name
            what.append((v.kind, name))
        owner = np.repeat(np.arange(len(space.variables)), space.sizes)
        place = np.concatenate([np.arange(n) for n in space.sizes])
        # (N, g) which groups each option belongs to: what it is of, in which third, and which option of what it is
        keys = [
            [("what", what[v]), ("third", what[v][0], third[v]), ("option", what[v], int(o))]
            for v, o in zip(owner, place, strict=True)
        ]
        index = {key: i for i, key in enumerate(dict.fromkeys(k for row in keys for k in row))}
        self.groups = np.zeros((len(owner), len(index)))
        for option, row in enumerate(keys):
            self.groups[option, [index[k] for k in row]] = 1.0
        self.owner = owner
        self.areas = sorted({(v.kind, t) for v, t in zip(space.variables, third, strict=True)})
        self.in_area = np.array(
            [[(v.kind, t) == area for area in self.areas] for v, t in zip(space.variables, third, strict=True)], float
        )
        # Of an option, how far it is from the best: 0 at the top, 1 at what loses most.
        harm = [np.sqrt(s / max(s.max(), 1e-300)) for s in estimate.single]
        self.harm = np.concatenate(harm)
        low, high = np.log(space.size_bytes([(0,) * len(space.sizes), space.top]).astype(float))
        self.size_scale = (low, max(high - low, 1e-9))

    def __call__(self, points: Sequence[Point] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Log predictions (m,); constant, prediction and size (m, 3); shares of groups, of variables and of options
        (m, g + n + N); P."""
        estimate, space = self.estimate, self.estimate.space
        points = np.asarray(points, dtype=np.int64).reshape(-1, len(space.sizes))
        log_predicted = np.log(np.maximum(estimate.predict(points), 1e-12))
        contributions = estimate.contributions(points)
        shares = contributions / np.maximum(contributions.sum(axis=1, keepdims=True), 1e-300)
        spread = np.zeros((len(points), len(self.owner)))
        np.put_along_axis(spread, points + estimate.offsets, shares, axis=1)
        size = (np.log(space.size_bytes(points).astype(float)) - self.size_scale[0]) / self.size_scale[1]
        harm = estimate.remaining(points) * self.harm[points + estimate.offsets]
        physical = harm @ self.in_area / self.in_area.sum(axis=0)
        plain = np.stack([np.ones(len(points)), log_predicted, size], axis=1)
        shares = np.concatenate((spread @ self.groups, shares, spread), axis=1)
        return log_predicted, plain, shares, np.c_[physical, size]


class Surrogate:
    """A Gaussian process fitted to trials: what it expects of points, and how the estimate is to be corrected."""

    def __init__(
        self, features: Features, points: Sequence[Point], losses: np.ndarray, errors: np.ndarray, *, seed: int
    ):
        self.features = features
        log_predicted, plain, shares, physical = features(points)
        self.center = plain.mean(axis=0) * [0, 1, 1]
        self.n_groups, self.n_variables = features.groups.shape[1], len(features.estimate.space.sizes)
        self.n_shares = shares.shape[1]
        self.r = np.log(losses) - log_predicted
        self.fixed = np.maximum(errors / losses, SURE) ** 2
        X = self._inputs(plain, shares, physical)
        self._fit(X[-FITTED:], self.r[-FITTED:], self.fixed[-FITTED:], seed)
        self.F, self.P = self._scaled(X)
        noise = self.fixed + self.noise
        self.chol = np.linalg.cholesky(self._kernel(self.F, self.P, self.F, self.P) + np.diag(noise + 1e-8))
        self.alpha = self._solve(self.r)

    def expects(self, points: Sequence[Point] | np.ndarray) -> "Expected":
        """Mean and variance of the log losses of points."""
        log_predicted, plain, shares, physical = self.features(points)
        F, P = self._scaled(self._inputs(plain, shares, physical))
        cross = self._kernel(self.F, self.P, F, P)
        half = np.linalg.solve(self.chol, cross)  # triangular, and small
        prior = (F**2).sum(axis=1) + self.output
        variance = np.maximum(prior - (half**2).sum(axis=0), 1e-12)
        return Expected(self, log_predicted + cross.T @ self.alpha, variance, half, F, P)

    def factors(self, rng: np.random.Generator | None) -> np.ndarray:
        """(N,) what the options' losses are to be multiplied by: as expected, or, with a generator, one that may be."""
        rest = self.r
        weights = np.zeros(self.F.shape[1])
        if rng is not None:
            weights = rng.standard_normal(self.F.shape[1])
            kernel = self._matern(self.P, self.P) + np.diag(self.fixed + self.noise + 1e-8)
            rest = self.r - self.F @ weights - np.linalg.cholesky(kernel) @ rng.standard_normal(len(self.r))
        weights = (weights + self.F.T @ self._solve(rest))[3:]
        of_group = weights[: self.n_groups] * self.group_deviation
        of_variable, of_option = np.split(weights[self.n_groups :] * self.variable_deviation, [self.n_variables])
        total = self.features.groups @ of_group + of_variable[self.features.owner] + of_option
        return np.exp(np.clip(total, -MOST, MOST))

    def _inputs(self, plain: np.ndarray, shares: np.ndarray, physical: np.ndarray) -> np.ndarray:
        return np.concatenate(((plain - self.center) * [CONSTANT, SLOPE, SIZE], shares, physical), axis=1)

    def _scaled(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.ones(q := 3 + self.n_shares)
        scale[3 : 3 + self.n_groups], scale[3 + self.n_groups :] = self.group_deviation, self.variable_deviation
        return X[:, :q] * scale, X[:, q:]

    def _kernel(self, F: np.ndarray, P: np.ndarray, G: np.ndarray, Q: np.ndarray) -> np.ndarray:
        return F @ G.T + self._matern(P, Q)

    def _matern(self, P: np.ndarray, Q: np.ndarray) -> np.ndarray:
        square = (P**2).sum(axis=1)[:, None] + (Q**2).sum(axis=1) - 2 * P @ Q.T
        d = np.sqrt(5 * np.maximum(square, 0.0)) / self.length
        return self.output * (1 + d + d**2 / 3) * np.exp(-d)

    def _solve(self, y: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self.chol.T, np.linalg.solve(self.chol, y))

    def _fit(self, X: np.ndarray, r: np.ndarray, fixed: np.ndarray, seed: int) -> None:
        """The scales of largest posterior density. Without any, those of largest prior density still rank points."""
        torch, model = self._model(X, r, fixed)
        from botorch.exceptions.errors import ModelFittingError
        from botorch.fit import fit_gpytorch_mll
        from gpytorch.mlls import ExactMarginalLogLikelihood

        # Retries of a failed fit draw from the global generator, which belongs to the caller.
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            try:
                fit_gpytorch_mll(
                    ExactMarginalLogLikelihood(model.likelihood, model),
                    optimizer_kwargs={"options": {"maxiter": FIT_ITERATIONS}},
                    max_attempts=1,
                    warning_handler=lambda w: True,  # a limit on iterations that was reached is no failure
                )
            except ModelFittingError:
                torch, model = self._model(X, r, fixed)
        model.eval()
        self.model = model
        _, groups, variables, matern = model.covar_module.kernels
        self.group_deviation, self.variable_deviation = (k.variance.item() ** 0.5 for k in (groups, variables))
        self.output, self.length = matern.outputscale.item(), matern.base_kernel.lengthscale.item()
        self.noise = model.likelihood.second_noise.item()

    def _model(self, X: np.ndarray, r: np.ndarray, fixed: np.ndarray):
        need_botorch()
        import torch
        from botorch.models import SingleTaskGP
        from gpytorch.constraints import GreaterThan
        from gpytorch.kernels import LinearKernel, MaternKernel, ScaleKernel
        from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
        from gpytorch.means import ZeroMean
        from gpytorch.priors import LogNormalPrior

        g, s = self.n_groups, self.n_shares
        prior = lambda mode, width: LogNormalPrior(math.log(mode) + width**2, width)
        spans = (range(3), range(3, 3 + g), range(3 + g, 3 + s), range(3 + s, X.shape[1]))
        plain = LinearKernel(active_dims=tuple(spans[0]))
        groups = LinearKernel(active_dims=tuple(spans[1]), variance_prior=prior(TRUST**2, 0.6))
        variables = LinearKernel(active_dims=tuple(spans[2]), variance_prior=prior(TRUST**2, 0.6))
        base = MaternKernel(nu=2.5, active_dims=tuple(spans[3]), lengthscale_prior=prior(0.7, 0.5))
        matern = ScaleKernel(base, outputscale_prior=prior(0.02, 1.0))
        likelihood = FixedNoiseGaussianLikelihood(torch.from_numpy(fixed), learn_additional_noise=True)
        extra = likelihood.second_noise_covar
        extra.register_constraint("raw_noise", GreaterThan(1e-8))
        extra.register_prior("noise_prior", prior(1e-4, 1.0), lambda m: m.noise, lambda m, v: m.initialize(noise=v))
        model = SingleTaskGP(
            torch.from_numpy(X),
            torch.from_numpy(r)[:, None],
            covar_module=plain + groups + variables + matern,
            mean_module=ZeroMean(),
            likelihood=likelihood,
            outcome_transform=None,
            input_transform=None,
        ).double()
        plain.variance = 1.0
        plain.raw_variance.requires_grad_(False)
        for kernel in (groups, variables):
            kernel.variance = TRUST**2
        base.lengthscale, matern.outputscale, likelihood.second_noise = 0.7, 0.02, 1e-4
        return torch, model


class Expected:
    """What a surrogate expects of a list of points, and how sure it is once it believes itself in some of them."""

    def __init__(self, surrogate: Surrogate, mean, variance, half, F, P):
        self.mean, self.variance = mean, variance
        self._surrogate, self._half, self._F, self._P = surrogate, half, F, P

    @property
    def deviation(self) -> np.ndarray:
        return np.sqrt(self.variance)

    def believe(self, i: int) -> None:
        """Point i counts as tried, with the loss that is expected of it: no mean changes, and doubt goes with it."""
        s = self._surrogate
        own = s._kernel(self._F[i : i + 1], self._P[i : i + 1], self._F, self._P)[0]
        own = own - self._half[:, i] @ self._half
        row = own / math.sqrt(max(own[i] + s.noise + float(np.median(s.fixed)), 1e-12))
        self._half = np.concatenate((self._half, row[None]))
        self.variance = np.maximum(self.variance - row**2, 1e-12)


@contextmanager
def _quiet():
    """Numerical remarks of the fit: it goes on with more jitter, or is given up for the prior's scales."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def need_botorch() -> None:
    """Import BoTorch, or say how to get it."""
    try:
        with warnings.catch_warnings():
            # linear_operator still decorates with torch.jit.script, which newer versions of torch deprecate.
            warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
            import botorch  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "the search needs BoTorch, which is not installed: pip install 'qpruner[search]'"
        ) from None
