"""`mooncake_master`, its flags and its HTTP."""
