"""Not here: see mooncake.dropin.left_out."""

from mooncake.dropin.left_out import refuse

refuse("fabric_allocator_utils")
