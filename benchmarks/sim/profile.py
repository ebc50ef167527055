"""What engines, memory and links cost: named profiles in profiles.toml, or a file of one's own."""

from pathlib import Path

import msgspec

from conductor.cost import Triple
from mooncake.core.errors import ConfigError

DEFAULT = "a800-llama2-70b"
SHIPPED = Path(__file__).with_name("profiles.toml")
PRIOR_MIN = 1e-12
"""The cost model takes no prior of zero."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one engine and its host. Times in seconds; n tokens of a prompt of which k are known.

    prefill_step_s: per chunk; prefill_token_s: per computed token; prefill_pair_s: times n*n - k*k.
    decode_step_s, decode_request_s, decode_kv_token_s: per step, per request and per token of context in it.
    egress_bytes_s: leaves a host; load_bytes_s: from its memory to the engine.
    gpu_kv_tokens: KV room of an engine; host_kv_tokens: of its host's store.
    """

    about: str = ""
    prefill_step_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_step_s: float
    decode_request_s: float
    decode_kv_token_s: float
    kv_token_bytes: int
    egress_bytes_s: float
    load_bytes_s: float
    gpu_kv_tokens: int
    host_kv_tokens: int
    sequences_max: int
    context_tokens_max: int

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: names the key and its value.
        """
        for name in self.__struct_fields__[1:]:
            value = getattr(self, name)
            zero_is_fine = name.startswith(("prefill_", "decode_")) or name == "host_kv_tokens"
            if not (value > 0 or (value == 0 and zero_is_fine)):
                raise ConfigError(f"profile: {name}={value!r} must be positive")

    def prefill_s(self, new_tokens: int, known_tokens: int) -> float:
        """Return the compute time of one chunk."""
        total = new_tokens + known_tokens
        pairs = total * total - known_tokens * known_tokens
        return self.prefill_step_s + self.prefill_token_s * new_tokens + self.prefill_pair_s * pairs

    def prompt_s(self, new_tokens: int, known_tokens: int, chunk_tokens: int) -> float:
        """Return the compute time of a whole prompt in chunks; 0 = in one."""
        steps = -(-new_tokens // chunk_tokens) if chunk_tokens else 1
        return self.prefill_s(new_tokens, known_tokens) + (steps - 1) * self.prefill_step_s

    def step_s(self, batch: int, kv_tokens: int) -> float:
        """Return the time of one decode step."""
        return self.decode_step_s + self.decode_request_s * batch + self.decode_kv_token_s * kv_tokens

    def prefill_prior(self) -> Triple:
        """Return it as the cost model's coefficients: pairs there are (n*n - k*k) / 2."""
        step, token, pair = self.prefill_step_s, self.prefill_token_s, 2 * self.prefill_pair_s
        return max(step, PRIOR_MIN), max(token, PRIOR_MIN), max(pair, PRIOR_MIN)

    def tbt_prior(self) -> Triple:
        """Return it as the cost model's coefficients."""
        step, request, kv = self.decode_step_s, self.decode_request_s, self.decode_kv_token_s
        return max(step, PRIOR_MIN), max(request, PRIOR_MIN), max(kv, PRIOR_MIN)


def read_profile(name: str) -> Profile:
    """Return a shipped profile by name, or one of FILE.toml or FILE.toml:NAME.

    Raises:
        ConfigError: no such profile or file, or a value in it is wrong.
    """
    path, table = SHIPPED, name
    if ".toml" in name:
        file, _, table = name.partition(".toml")
        path, table = Path(f"{file}.toml"), table.removeprefix(":")
    try:
        profiles = msgspec.toml.decode(path.read_bytes(), type=dict[str, Profile])
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"profile {path}: {error}") from None
    if not table and profiles:
        table = next(iter(profiles))
    if table not in profiles:
        raise ConfigError(f"profile {table!r}: {path.name} has {', '.join(profiles) or 'none'}")
    return profiles[table]
