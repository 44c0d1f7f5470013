"""What one asks of trained dictionaries."""

from unweave.analysis.atoms import AtomSource as AtomSource
from unweave.analysis.atoms import atom_sources as atom_sources
from unweave.analysis.attention import AttentionAttribution as AttentionAttribution
from unweave.analysis.attention import FeatureNode as FeatureNode
from unweave.analysis.attention import head_weights as head_weights
from unweave.analysis.attention import recursive_attribution as recursive_attribution
from unweave.analysis.attention import top_features_of_heads as top_features_of_heads
from unweave.analysis.attention_trace import AttentionTrace as AttentionTrace
from unweave.analysis.attention_trace import trace_attention as trace_attention
