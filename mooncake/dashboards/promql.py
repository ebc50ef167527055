"""Short ways to write the queries of a board. Each selector carries the board's variables."""

WINDOW = "$__rate_interval"
INSTANCE = 'instance_id=~"$instance"'
TENANT = 'tenant=~"$tenant"'
PROCESS = 'process=~"$process"'
_MODELS = {"vllm:": 'model_name=~"$model"', "gen_ai_": 'gen_ai_request_model=~"$model"'}
"""By how a name begins; a cluster serves one model, so our own metrics need no such label."""
_NAMESPACE = 'namespace=~"$namespace"'


def metric(name: str, *matchers: str) -> str:
    """Return a selector, limited to the chosen namespace and, where a metric tells it, model."""
    model = tuple(matcher for begin, matcher in _MODELS.items() if name.startswith(begin))
    return f"{name}{{{', '.join((_NAMESPACE, *model, *matchers))}}}"


def rate(name: str, *matchers: str, window: str = WINDOW) -> str:
    """Return the increase per second of a counter."""
    return f"rate({metric(name, *matchers)}[{window}])"


def total(expr: str, *by: str) -> str:
    """Return the sum of `expr`, by labels or of all."""
    return f"sum by ({', '.join(by)}) ({expr})" if by else f"sum({expr})"


def most(expr: str, *by: str) -> str:
    """Return the largest of `expr`: for gauges that several processes tell alike."""
    return f"max by ({', '.join(by)}) ({expr})" if by else f"max({expr})"


def ratio(part: str, whole: str) -> str:
    """Return part / whole; nothing where the whole is 0: no traffic is neither good nor bad."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, name: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """Return a quantile of a histogram."""
    return f"histogram_quantile({q}, {total(rate(f'{name}_bucket', *matchers), *by, 'le')})"


def mean(name: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """Return the mean of a histogram or summary: its sum over its count."""
    return ratio(total(rate(f"{name}_sum", *matchers), *by), total(rate(f"{name}_count", *matchers), *by))
