// Draws the figures of the gallery in the colours of the page.
const dark = () => document.body.dataset.mdColorScheme === "slate";
function draw() {
  for (const source of document.querySelectorAll("script.wb-figure")) {
    const figure = JSON.parse(source.textContent);
    figure.layout.font = { ...figure.layout.font, color: dark() ? "#d6d6d4" : "#333" };
    figure.layout.autosize = true;
    Plotly.react(source.previousElementSibling, figure.data, figure.layout,
      { responsive: true, displayModeBar: false, plotlyServerURL: "" });
  }
}
draw();
new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
