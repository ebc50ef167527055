"""Not here: see mooncake.dropin.left_out."""

from mooncake.dropin.left_out import refuse

refuse("spdk_tgt_create")
