"""How one feature is shown, wherever that is: templates, style, charts, and the page that stands alone.

A notebook shows :func:`feature_card_html`; the site and the exported files of ``unweave.web`` render the same templates
(``feature_body.html``, ``features_page.html``) with :func:`unweave.features.card.page.new_environment`.
"""

from unweave.features.card.lines import FeatureLines
from unweave.features.card.page import feature_card_html

__all__ = ["FeatureLines", "feature_card_html"]
