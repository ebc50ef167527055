"""`mooncake up`: a whole cluster on one machine, started, watched and stopped as one thing.

plan.py     pure: options -> which processes, on which cores, with which environment
metrics.py  ports of the metrics, prometheus.yml
launch.py   what a child process runs
zygote.py   the warm process that has vLLM imported and forks engines in milliseconds
starter.py  starts a planned process, through the zygote or as a plain subprocess
cluster.py  startup, watch, shutdown
show.py     what the terminal shows meanwhile
"""
