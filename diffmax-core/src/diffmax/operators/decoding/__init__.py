"""`attention_with_kvcache`: attention over a cache of keys and values."""
