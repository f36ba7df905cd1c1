"""Every `nanoflow COMMAND`: arguments in, text out. Nothing heavy is imported before one runs."""
