"""What other programs print and record about machines, read as facts. Pure functions of text; `app` reads the files."""
