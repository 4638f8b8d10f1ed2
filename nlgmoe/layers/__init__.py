"""The layers: attention, feed-forward, router, dispatch, experts, MoE. They depend on torch only, not on training."""
