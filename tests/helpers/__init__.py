"""What tests share: tiny runs and their folders, images, processes, programs that are run by hand."""
