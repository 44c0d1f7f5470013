"""All that the author of a plug-in has to write."""

from unweave.testing import parametrize_with_checks


@parametrize_with_checks(
    ["unweave_sample.tied:Tied", "unweave_sample.tied:Curved", "unweave_sample.centroids:Centroids"]
)
def test_sample(check):
    check()
