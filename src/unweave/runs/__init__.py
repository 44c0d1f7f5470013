"""The run folder: its recipe, its provenance, and everything one asks of a finished one."""

from unweave.runs.run import Run as Run
from unweave.runs.run import TextCode as TextCode
from unweave.runs.run import load as load
