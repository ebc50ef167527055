"""What an HTTP client is told of a request that was turned away."""

from http import HTTPStatus

from conductor.plan import Reason, Rejection
from conductor.vllm_seam import Unavailable

_STATUS = {
    Reason.NO_INSTANCE_FITS: HTTPStatus.BAD_REQUEST,
    Reason.TTFT_SLO: HTTPStatus.TOO_MANY_REQUESTS,
    Reason.JOB_TIME: HTTPStatus.TOO_MANY_REQUESTS,
    Reason.TBT_SLO: HTTPStatus.TOO_MANY_REQUESTS,
    Reason.PREFILL_LOAD: HTTPStatus.TOO_MANY_REQUESTS,
    Reason.DECODE_LOAD: HTTPStatus.TOO_MANY_REQUESTS,
    Reason.QUOTA: HTTPStatus.TOO_MANY_REQUESTS,
}
"""HTTP status of a rejection; 503 where nothing is said."""


def unavailable(rejection: Rejection) -> Unavailable:
    """Return the error that tells an HTTP client of `rejection`."""
    detail = f": {rejection.detail}" if rejection.detail else ""
    status = _STATUS.get(rejection.reason, HTTPStatus.SERVICE_UNAVAILABLE)
    return Unavailable(f"{rejection.reason}{detail}", rejection.retry_after_s, status)
