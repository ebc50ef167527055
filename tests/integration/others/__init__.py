"""Programs that run other projects' own classes on our package: a job on stdin, JSON on stdout."""
