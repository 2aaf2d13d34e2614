"""`attention` and `attention_varlen`: fused attention."""
