"""Change gradients before the optimizer step: accumulate, measure, clip, skip; step with sharpness-aware gradients."""
