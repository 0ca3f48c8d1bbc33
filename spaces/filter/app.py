"""A Space that shows what a pipeline draws and what its filter lets through. Name yours in JOB."""

from hf_unlearn.app.launch import launch
from hf_unlearn.jobs.recipe.app import AppJob


JOB = AppJob(
    open=["digits-gan"],  # yours: ["me/my-pipeline", "me/my-filter"], or ["me/my-filtered-pipeline"]
    output_dir=None,  # visitors mark and fit, and save nothing
)

if __name__ == "__main__":
    launch(JOB)
