"""The live dashboard: its widget, the board that draws in the browser, and the server of the page."""
