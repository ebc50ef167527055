"""The contenders of benchmarks.transfer, one module each; see worker.py for how they are driven.

Those of other people live in their own virtual environment (`install DIR` makes it), which has
numpy but nothing of ours: these modules import no more than numpy at their top.
"""
