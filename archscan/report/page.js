// Brings the page to life, part by part: the text stands without any of it.
const pageData = JSON.parse(document.getElementById("data").textContent);
// What is folded away would be missing on paper.
function unfoldOnPaper() {
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => (part.open = true));
  });
  addEventListener("afterprint", () => folded.forEach((part) => (part.open = false)));
}

unfoldOnPaper();
liveTables();
liveBars(pageData);
drawNetwork(pageData);
liveCharts(pageData);
