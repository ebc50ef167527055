"""Not here: see mooncake.dropin.left_out."""

from mooncake.dropin.left_out import refuse

refuse("vllm_v1_proxy_server")
