"""A score that no gradient reaches, raised on a 4-bit model."""
