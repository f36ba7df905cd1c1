"""`nanoflow profile`: the ops of a plan measured on the present machine, alone and in pairs, into a table file."""
