"""What a program asks of the workbench: functions whose answers are plain data.

The command line prints the answers, its option ``--json`` writes them as one JSON object, and the MCP server returns
them: there is one set of functions. :mod:`workbench.api.answers` has the answers, :mod:`workbench.api.ablations` the
functions about ablations, :mod:`workbench.api.results` those that read results.
"""
