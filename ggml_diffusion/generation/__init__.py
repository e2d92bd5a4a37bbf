"""Text out of masks: the converted model, the denoising loop and the sampler's arithmetic.

Takes a predictor and plain numbers; knows no training.
"""
