"""FilteredPipeline: any pipeline that draws images, with a filter around it."""
