"""What a run leaves for people: tables on the terminal, CSV, a page of HTML, two runs side by side."""
