"""Finished jobs: from a recipe to a run folder, and the demo."""

from unweave.workflows.harvesting import harvest_only as harvest_only
from unweave.workflows.harvesting import harvest_sites as harvest_sites
from unweave.workflows.pipeline import Pipeline as Pipeline
from unweave.workflows.pipeline import first_rows as first_rows
