"""The app: opens filters and pipelines in the browser. [`page`][hf_unlearn.app.page] is its layout; what it does is in the other files."""
