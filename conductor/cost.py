"""Predicted seconds of prefill, transfer and decode, corrected by what was measured.

Prefill (paper 1.2, "est_prefill: polynomial regression"): compute is linear in the new tokens plus
attention of each new token over all before it, so
`prefill_s = a + b * new + c * new * (prefix + new / 2)`.
Decode: a step reads the weights once and every context's KV, so `tbt_s = a + b * batch + c * kv`.
Both are fitted online by recursive least squares on *relative* errors (a 10 ms and a 10 s prefill
count alike) with exponential forgetting. Coefficients never go below zero: a negative one would
make more work look cheaper and pull the whole load onto one instance.
"""

from math import inf, isfinite, sqrt

import msgspec

from conductor.lengths import OutputLengths

FORGETTING = 0.98
"""Weight of the past per observation: the last ~50 decide, so a load change shows within seconds."""
PRIOR_SPREAD = 100.0
"""Prior variance of a coefficient relative to its prior: it may be ten times wrong, so the first
few dozen measurements decide, not the prior."""
SPREAD_MAX = 1000.0
"""Bound of each variance: without it, identical observations blow it up under forgetting."""
ERROR_RATIO_MAX = 4.0
"""One observation is taken for at most this many times its prediction: a stall is no trend. And for at least
such a part of it: errors are relative, so one of nothing would weigh more than all others together."""
TREND = 3
"""So many beyond it in a row are one: a slow machine. Then the model is scaled up and learns afresh; bounded
measurements alone need hundreds for a factor of 20, as relative errors give the early ones most weight."""
DEVIATIONS = 2.5
"""Mean deviations above the mean lateness (TCP takes 4). Caution is free: under overload others wait."""
SECONDS_MAX = 3600.0
"""Measurements outside (0, 1 h] are mistakes (clock steps, lost stamps) and are ignored."""
EWMA_WEIGHT = 0.1
"""Weight of the newest value in moving averages: half of it is the last 7."""
PREFILL_PRIOR = (2e-3, 5e-5, 1e-9)
"""Seconds: per prefill, per token (20k tokens/s), per token pair. Of a small model; soon relearnt."""
TBT_PRIOR = (8e-3, 2e-4, 2e-8)
"""Seconds: per step, per running request, per KV token read."""
LOCAL_BYTES_S = 4e9
REMOTE_BYTES_S = 1e9
"""Priors of a shared-memory load and of a load from another host (10 Gb/s)."""
BYTES_S_MIN = 1e6
"""Slowest believable bandwidth: keeps one stalled transfer from forbidding all others."""
OUTPUT_TOKENS_PRIOR = 256.0
OUTPUT_SHARE = 0.9
"""Share of answers that fit the KV room looked for: one that runs out of it is computed again."""
SECONDS_MIN = 1e-6
"""No prediction is zero or below: ratios stay finite."""
EXPECTED_MAX = 1024
"""Questions about answers that are remembered until the next answer ends: some 200 kB."""
MAX_TOKENS = 1 << 30
"""Of a request whose limit is not known: none."""


Triple = tuple[float, float, float]


class CostErrors(msgspec.Struct, frozen=True):
    """Moving mean of |predicted - measured| / measured, and how many were measured."""

    prefill_ratio: float
    prefill_count: int
    tbt_ratio: float
    tbt_count: int
    transfer_ratio: float
    transfer_count: int
    rejected_count: int
    output_ratio: float
    output_count: int


class _Error:
    """Moving relative error of one prediction."""

    def __init__(self) -> None:
        self.ratio = 0.0
        self.count = 0

    def add(self, predicted: float, measured: float) -> None:
        error = abs(predicted - measured) / measured
        self.count += 1
        # a true mean until the window is full, so that the first error does not linger
        self.ratio += (error - self.ratio) * max(EWMA_WEIGHT, 1 / self.count)


class _Fit:
    """Recursive least squares of seconds on 3 features, scaled so that every prior is 1."""

    def __init__(self, prior: Triple) -> None:
        self._scale = prior
        size = len(self._scale)
        self._coefficients = [1.0] * size
        self.coefficients = prior
        self._spread = _diagonal(PRIOR_SPREAD, size)
        self._beyond: list[float] = []  # measured by predicted, of the last ones if nobody believed them
        self.error = _Error()

    def predict(self, features: Triple) -> float:
        (a, b, c), (x, y, z) = self.coefficients, features  # unrolled: asked many times per decision
        seconds = a * x + b * y + c * z
        return seconds if seconds > SECONDS_MIN else SECONDS_MIN

    def observe(self, features: Triple, seconds: float) -> None:
        predicted = self.predict(features)
        self.error.add(predicted, seconds)
        if self._is_trend(seconds / predicted):
            predicted = self.predict(features)
        bounded = min(max(seconds, predicted / ERROR_RATIO_MAX), predicted * ERROR_RATIO_MAX)
        # dividing a row by its own seconds makes the error relative
        row = [f * s / bounded for f, s in zip(features, self._scale, strict=True)]
        spread, size = self._spread, range(len(row))
        gain = [sum(spread[i][j] * row[j] for j in size) for i in size]
        denominator = FORGETTING + sum(row[i] * gain[i] for i in size)
        step = (1 - sum(self._coefficients[i] * row[i] for i in size)) / denominator
        self._coefficients = [max(0.0, c + g * step) for c, g in zip(self._coefficients, gain, strict=True)]
        first, second, third = (c * s for c, s in zip(self._coefficients, self._scale, strict=True))
        self.coefficients = (first, second, third)
        fresh = [[(spread[i][j] - gain[i] * gain[j] / denominator) / FORGETTING for j in size] for i in size]
        if not all(0 < fresh[i][i] < inf for i in size):
            # rounding has eaten a variance (features many orders of magnitude apart): learn afresh
            self._spread = _diagonal(PRIOR_SPREAD, len(row))
            return
        # shrink only what was not seen lately: rows and columns alike, so that it stays positive
        shrink = [min(1.0, sqrt(SPREAD_MAX / fresh[i][i])) for i in size]
        self._spread = [[fresh[i][j] * shrink[i] * shrink[j] for j in size] for i in size]

    def _is_trend(self, ratio: float) -> bool:
        """Note how far a measurement is above its prediction; the TREND-th beyond belief moves the scale."""
        if ratio <= ERROR_RATIO_MAX:
            self._beyond.clear()
            return False
        self._beyond.append(ratio)
        if len(self._beyond) < TREND:
            return False
        factor = min(self._beyond)  # others may be stalls
        self._beyond.clear()
        self._scale = _times(factor, self._scale)
        self.coefficients = _times(factor, self.coefficients)
        self._spread = _diagonal(PRIOR_SPREAD, len(self._scale))
        return True


def _times(factor: float, triple: Triple) -> Triple:
    first, second, third = triple
    return factor * first, factor * second, factor * third


def _diagonal(value: float, size: int) -> list[list[float]]:
    return [[value if i == j else 0.0 for j in range(size)] for i in range(size)]


class _Lateness:
    """By how much first tokens come later than planned: mean and mean deviation, as TCP keeps its timer."""

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._deviation_s = 0.0

    @property
    def seconds(self) -> float:
        """What most of them do not exceed; 0 or above."""
        return max(0.0, self._mean_s + DEVIATIONS * self._deviation_s)

    def add(self, seconds: float) -> None:
        error_s = seconds - self._mean_s
        self._mean_s += error_s * EWMA_WEIGHT
        self._deviation_s += (abs(error_s) - self._deviation_s) * EWMA_WEIGHT


class CostModel:
    """One model for all instances of a served model. Constant time and memory per call."""

    def __init__(
        self,
        prefill_prior: Triple = PREFILL_PRIOR,
        tbt_prior: Triple = TBT_PRIOR,
        local_bytes_s: float = LOCAL_BYTES_S,
        remote_bytes_s: float = REMOTE_BYTES_S,
    ) -> None:
        """Priors, all > 0: (seconds per call, per token or request, per token pair or KV token); bytes/s."""
        assert min(*prefill_prior, *tbt_prior, local_bytes_s, remote_bytes_s) > 0
        self._prefill = _Fit(prefill_prior)
        self._tbt = _Fit(tbt_prior)
        self._bytes_s = {False: local_bytes_s, True: remote_bytes_s}
        self._transfer_error = _Error()
        self._output_tokens = OUTPUT_TOKENS_PRIOR
        self._output_error = _Error()
        self._lengths = OutputLengths()
        self._expected: dict[tuple[int, str, str, int], tuple[int, int]] = {}  # since the last answer
        self._rejected = 0
        self._late = _Lateness()

    @property
    def late_s(self) -> float:
        """By how much most first tokens come later than planned: hand-over, waiting for a place, mistakes."""
        return self._late.seconds

    def observe_late(self, seconds: float) -> None:
        """A first token came so much later than planned; below 0 = sooner."""
        if isfinite(seconds) and abs(seconds) <= SECONDS_MAX:
            self._late.add(seconds)

    def prefill_s(self, new_tokens: int, prefix_tokens: int) -> float:
        """Predict the engine time of computing new_tokens after prefix_tokens known ones."""
        return self._prefill.predict(_prefill_features(new_tokens, prefix_tokens))

    def observe_prefill(self, new_tokens: int, prefix_tokens: int, seconds: float) -> None:
        """Learn from one measured prefill (engine time without its queue)."""
        if self._credible(seconds):
            self._prefill.observe(_prefill_features(new_tokens, prefix_tokens), seconds)

    def transfer_s(self, size_bytes: int, *, remote: bool) -> float:
        """Predict loading size_bytes from the own node's store, or from another node's."""
        return size_bytes / self._bytes_s[remote]

    def observe_transfer(self, size_bytes: int, seconds: float, *, remote: bool) -> None:
        """Learn from one measured load or hand-over. Empty ones say nothing of bandwidth."""
        if size_bytes <= 0 or not self._credible(seconds):
            return
        self._transfer_error.add(self.transfer_s(size_bytes, remote=remote), seconds)
        # averages seconds per byte, not bytes per second: times add up, speeds do not
        pace = 1 / self._bytes_s[remote]
        pace += (min(seconds / size_bytes, ERROR_RATIO_MAX * pace) - pace) * EWMA_WEIGHT
        self._bytes_s[remote] = max(1 / pace, BYTES_S_MIN)

    def tbt_s(self, batch: int, kv_tokens: int) -> float:
        """Predict the time between tokens of a decode batch with kv_tokens in all its contexts."""
        return self._tbt.predict((1.0, batch, kv_tokens))

    def observe_tbt(self, batch: int, kv_tokens: int, seconds: float) -> None:
        """Learn from one measured gap."""
        if self._credible(seconds):
            self._tbt.observe((1.0, batch, kv_tokens), seconds)

    def output_tokens(
        self, max_tokens: int, tenant: str = "", slo_class: str = "", emitted_n: int = 0
    ) -> int:
        """Predict how many tokens a request will emit in all: the mean of its like, capped.

        Args:
            max_tokens: its limit.
            tenant: whose it is.
            slo_class: its class of service; "" = unknown, then the moving mean of all answers is taken.
            emitted_n: tokens it has emitted already.
        """
        return self.output_range(max_tokens, tenant, slo_class, emitted_n)[0]

    def output_tokens_high(
        self, max_tokens: int, tenant: str = "", slo_class: str = "", emitted_n: int = 0
    ) -> int:
        """Predict what OUTPUT_SHARE of such requests will not exceed; see `output_tokens`."""
        return self.output_range(max_tokens, tenant, slo_class, emitted_n)[1]

    def output_range(self, max_tokens: int, tenant: str, slo_class: str, emitted_n: int) -> tuple[int, int]:
        """Return both; every instance that a request may run on asks for the same."""
        asked = max_tokens, tenant, slo_class, emitted_n
        found = self._expected.get(asked)
        if found is not None:
            return found
        mean = self._lengths.mean(tenant, slo_class, emitted_n) if slo_class else None
        high = self._lengths.quantile(tenant, slo_class, OUTPUT_SHARE, emitted_n) if slo_class else None
        expected = min(max_tokens, max(1, round(self._output_tokens if mean is None else mean)))
        found = expected, expected if high is None else min(max_tokens, max(1, round(high)))
        if len(self._expected) >= EXPECTED_MAX:
            self._expected.clear()
        self._expected[asked] = found
        return found

    def observe_output(
        self, tokens: int, tenant: str = "", slo_class: str = "", max_tokens: int = MAX_TOKENS
    ) -> None:
        """Learn from one finished request; see `output_tokens`."""
        if tokens <= 0:
            return
        self._expected.clear()
        self._output_error.add(self.output_tokens(max_tokens, tenant, slo_class), tokens)
        self._output_tokens += (tokens - self._output_tokens) * EWMA_WEIGHT
        if slo_class:
            self._lengths.observe(tenant, slo_class, tokens)

    def prefill_coefficients(self) -> Triple:
        """Return (a, b, c) in seconds, seconds per token, seconds per token pair."""
        return self._prefill.coefficients

    def tbt_coefficients(self) -> Triple:
        """Return (a, b, c) in seconds, seconds per request, seconds per KV token."""
        return self._tbt.coefficients

    def errors(self) -> CostErrors:
        """Return how far predictions were from measurements."""
        return CostErrors(
            self._prefill.error.ratio,
            self._prefill.error.count,
            self._tbt.error.ratio,
            self._tbt.error.count,
            self._transfer_error.ratio,
            self._transfer_error.count,
            self._rejected,
            self._output_error.ratio,
            self._output_error.count,
        )

    def _credible(self, seconds: float) -> bool:
        credible = isfinite(seconds) and 0 < seconds <= SECONDS_MAX
        self._rejected += not credible
        return credible


def _prefill_features(new_tokens: int, prefix_tokens: int) -> Triple:
    new, prefix = max(0, new_tokens), max(0, prefix_tokens)
    return 1.0, new, new * (prefix + new / 2)
