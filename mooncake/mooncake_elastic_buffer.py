"""Not here: see mooncake.dropin.left_out."""

from mooncake.dropin.left_out import refuse

refuse("mooncake_elastic_buffer")
