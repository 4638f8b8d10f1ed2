"""The layers: attention, feed-forward, router, dispatch, experts, MoE. Torch only; nothing here knows about training."""
