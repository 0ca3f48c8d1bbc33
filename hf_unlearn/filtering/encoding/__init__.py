"""From images, texts and latents to the vectors that a filter judges."""
