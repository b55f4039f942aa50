from .activity import HeadActivity as HeadActivity, head_activity as head_activity
from .maps import TokenView as TokenView, attention_grid as attention_grid, attention_view as attention_view
from .readers import reading_heads as reading_heads
from .statistics import AttentionStatistics as AttentionStatistics, attention_statistics as attention_statistics

__all__: list[str]
