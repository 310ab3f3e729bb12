const dark = matchMedia("(prefers-color-scheme: dark)");
const shown = {}, all = {};
const ink = printing => dark.matches && !printing ? "#d6d6d4" : "#333";
function draw(name, printing) {
  if (!window.Plotly) return; // still being unpacked
  const figure = structuredClone(all[name][shown[name]]);
  figure.layout.font = {...figure.layout.font, color: ink(printing)};
  figure.layout.hoverlabel = {...figure.layout.hoverlabel, bgcolor: dark.matches ? "#2a2a2b" : "#fff",
    font: {color: ink(false)}};
  figure.layout.autosize = !printing;
  if (printing) { // what fits on a page of A4 or letter, with room for labels that end beyond the axis
    figure.layout.width = 680;
    figure.layout.margin = {...figure.layout.margin, r: 70};
  }
  Plotly.react(name, figure.data, figure.layout,
    {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"], plotlyServerURL: ""});
}
const drawAll = printing => Object.keys(all).forEach(name => draw(name, printing));
for (const source of document.querySelectorAll("script[data-for]")) {
  all[source.dataset.for] = JSON.parse(source.textContent);
  shown[source.dataset.for] = 0;
}
for (const button of document.querySelectorAll("button[data-for]"))
  button.addEventListener("click", () => {
    shown[button.dataset.for] = Number(button.dataset.index);
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    draw(button.dataset.for);
  });
for (const button of document.querySelectorAll("button[data-copy]"))
  button.addEventListener("click", () =>
    navigator.clipboard?.writeText(button.dataset.copy).then(() => { button.textContent = "Copied"; }));
dark.addEventListener("change", () => drawAll());
addEventListener("beforeprint", () => drawAll(true));
addEventListener("afterprint", () => drawAll());
async function start() { // plotly.js is kept compressed: it is most of the file
  const packed = document.getElementById("plotly");
  const bytes = Uint8Array.from(atob(packed.textContent), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  packed.replaceWith(script);
  drawAll();
}
start().catch(error => {
  for (const plot of document.querySelectorAll(".plot"))
    plot.textContent = `This browser cannot draw the figures (${error}). The tables are complete.`;
});
